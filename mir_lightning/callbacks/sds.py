"""``SDSCallback``: what the model can do yet, perception or reasoning, at points of a training run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from transformers import PreTrainedModel

from mir_lightning.callbacks import reporting
from mir_lightning.callbacks.probing import OnError, ProbingCallback
from mir_lightning.callbacks.schedule import Schedule
from mir_lightning.callbacks.strategies import forward_through_strategy
from mir_lightning.functional.checks import check_at_least_one, check_choice
from mir_lightning.probing.candidate_scores import Score
from mir_lightning.probing.choice_probe import ChoiceProbe, ChoicesLike
from mir_lightning.probing.choices import ChoiceResult, evaluate_choices
from mir_lightning.vlm import find_vlm


class SDSCallback(ProbingCallback):
    """Evaluate the Soft Discrimination Score (RADAR, arXiv 2602.12892) of the model in training.

    Nothing is asked of the LightningModule but that it holds a Hugging Face vision-language model. The run is
    the same bit for bit with and without the callback. Logged to every logger of the Trainer: ``sds``,
    ``sds/<ability>`` and ``sds/<ability>/<task>``, the accuracies ``acc``, ``acc/<ability>``, ..., the chance
    levels ``sds_chance``, ``sds_chance/<ability>``, ..., ``sds_probe/seconds`` and ``sds_probe/overhead``; the
    picture ``sds_media/abilities``. Scores, accuracies and chance levels are set in ``trainer.callback_metrics``
    too, so that ``ModelCheckpoint(monitor="sds/perception", mode="max")`` works.

    Distributed, each rank runs its share of the items, and all log and see the numbers of all of them. Give every
    rank the same items.

    Args:
        items: a :class:`~mir_lightning.probing.ChoiceProbe`, or a zero-argument callable that makes one when the
            fit starts.
        every_n_steps: optimizer steps between evaluations; ``None`` for none. The schedules below add to it.
        at_start: evaluate before the first step.
        at_end: evaluate after the last step, if that step was not evaluated yet.
        score: what a candidate's token counts: its raw ``"logit"`` or its ``"logprob"``.
        batch_size: candidates in a forward.
        model: dotted path of the Hugging Face model inside the LightningModule; found by itself when None.
        name: prefix of everything logged, but ``acc``, which is ``<name>_acc`` under another name; choose another
            for a second set of items.
        on_error: what a failed evaluation does once training runs: ``"warn"`` reports it with the step and
            training goes on; ``"raise"`` stops. What can be checked at the start always raises.
        at_steps: also evaluate after these optimizer steps.
        growth: also evaluate after 1, 2, ... steps, each point about ``growth`` times the last.
        every_n_epochs: also evaluate at the end of every so many training epochs.
        every_n_tokens: also evaluate whenever so many more tokens have been trained on.
        max_overhead: largest share of the training time that evaluations may take, start and end apart.
        strict_probe: raise, instead of warning, when a run resumes with other items.

    Raises:
        ValueError: for an unknown option or an interval below 1; when the fit starts, for a module that does not
            fit, ranks with different items, or tensor parallelism.
        TypeError: when the fit starts, for items of another kind.
    """

    label = "SDS"
    best = "max"

    def __init__(
        self,
        items: ChoicesLike,
        every_n_steps: int | None = 500,
        at_start: bool = True,
        at_end: bool = True,
        score: Score = "logit",
        batch_size: int = 32,
        model: str | None = None,
        name: str = "sds",
        on_error: OnError = "warn",
        at_steps: Sequence[int] = (),
        growth: float | None = None,
        every_n_epochs: int | None = None,
        every_n_tokens: int | None = None,
        max_overhead: float | None = None,
        strict_probe: bool = False,
    ) -> None:
        check_choice("score", score, Score)
        check_at_least_one(batch_size=batch_size)
        schedule = Schedule(every_n_steps, tuple(at_steps), growth, every_n_epochs, every_n_tokens)
        super().__init__(schedule, at_start, at_end, name, on_error, max_overhead, strict_probe)
        self.items = items
        self.score = score
        self.batch_size = batch_size
        self.model = model
        self._network: PreTrainedModel | None = None

    def _prepare(self, pl_module: pl.LightningModule) -> tuple[str, dict[str, Any]]:
        self._network = find_vlm(pl_module, self.model)
        self.items = items = ChoiceProbe.of(self.items)
        return items.fingerprint, {
            "score": self.score,
            "items_fingerprint": items.fingerprint,
            "items": len(items),
        }

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> ChoiceResult:
        network, items = self._network, self.items
        assert network is not None
        assert isinstance(items, ChoiceProbe)
        with trainer.precision_plugin.forward_context():
            return evaluate_choices(
                network,
                items,
                self.score,
                self.batch_size,
                forward=forward_through_strategy(trainer, pl_module, network),
                distributed=trainer.world_size > 1,
                progress=self._bar_title(trainer),
            )

    def _values(self, result: ChoiceResult) -> dict[str, float]:
        accuracy = "acc" if self.name == "sds" else f"{self.name}_acc"
        values = {}
        for path, found in result.breakdown.items():
            below = f"/{path}" if path else ""
            values[f"{self.name}{below}"] = found.sds
            values[f"{accuracy}{below}"] = found.accuracy
            values[f"{self.name}_chance{below}"] = found.chance
        return values

    def _point(self, result: ChoiceResult, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "sds": result.sds,
            "acc": result.accuracy,
            "chance": result.chance,
            "seconds": result.seconds,
            "shared_prefix": result.shared_prefix,
            "breakdown": {path: list(found[:3]) for path, found in result.breakdown.items() if path},
        }

    def _draw(self, trainer: pl.Trainer, result: ChoiceResult) -> None:
        if not trainer.is_global_zero:
            return
        abilities = [path for path in result.breakdown if path and "/" not in path]
        gap = [math.nan] * 3  # in the curve of an ability that earlier items did not ask for
        scores = {a: [point["breakdown"].get(a, gap)[::2] for point in self.history] for a in abilities}
        figures = {"abilities": reporting.ability_figure([point["step"] for point in self.history], scores)}
        rows = [[trainer.global_step, path or "all", *found] for path, found in result.breakdown.items()]
        table = ["step", "items", "sds", "accuracy", "chance", "number"], rows
        reporting.log_figures(trainer, self.name, figures, table)
