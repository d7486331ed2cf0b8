"""``FewShotCallback``: answers after k examples, the in-context baseline at points of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from transformers import PreTrainedModel

from mir_lightning.callbacks.probing import OnError, ProbingCallback
from mir_lightning.callbacks.schedule import Schedule
from mir_lightning.callbacks.strategies import forward_through_strategy
from mir_lightning.functional.checks import check_at_least_one
from mir_lightning.probing.few_shot import FewShotLike, FewShotProbe, FewShotResult, evaluate_few_shot
from mir_lightning.vlm import find_vlm


class FewShotCallback(ProbingCallback):
    """Evaluate the few-shot in-context score of the model in training.

    Logged to every logger, and set in ``trainer.callback_metrics``: ``few_shot/em_<k>`` and ``few_shot/f1_<k>``
    (exact match and token F1 after k examples, mean over tasks), the same by task, ``few_shot/em_<k>/<task>``, and
    ``few_shot_probe/seconds`` and ``few_shot_probe/overhead``.

    Args:
        items: a :class:`~mir_lightning.probing.few_shot.FewShotProbe`, or a zero-argument callable that makes one
            when the fit starts.
        every_n_steps: optimizer steps between evaluations; ``None`` for none.
        at_start: evaluate before the first step.
        at_end: evaluate after the last step, if that step was not evaluated yet.
        max_new_tokens: length of an answer.
        batch_size: answers written at a time.
        model: dotted path of the Hugging Face model inside the LightningModule; found by itself when None.
        name: prefix of everything logged.
        on_error: what a failed evaluation does once training runs: ``"warn"`` or ``"raise"``.
        at_steps: also evaluate after these optimizer steps.
        max_overhead: largest share of the training time that evaluations may take, start and end apart.

    Raises:
        ValueError: for an unknown option or a number below 1; when the fit starts, for a module that does not fit,
            ranks with different items, or tensor parallelism.
        TypeError: when the fit starts, for items of another kind.
    """

    label = "Few-shot"
    best = "max"

    def __init__(
        self,
        items: FewShotLike,
        every_n_steps: int | None = 500,
        at_start: bool = True,
        at_end: bool = True,
        max_new_tokens: int = 16,
        batch_size: int = 8,
        model: str | None = None,
        name: str = "few_shot",
        on_error: OnError = "warn",
        at_steps: Sequence[int] = (),
        max_overhead: float | None = None,
    ) -> None:
        check_at_least_one(max_new_tokens=max_new_tokens, batch_size=batch_size)
        schedule = Schedule(every_n_steps, tuple(at_steps))
        super().__init__(schedule, at_start, at_end, name, on_error, max_overhead, strict_probe=False)
        self.items = items
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.model = model
        self._network: PreTrainedModel | None = None

    def _prepare(self, pl_module: pl.LightningModule) -> tuple[str, dict[str, Any]]:
        self._network = find_vlm(pl_module, self.model)
        self.items = items = FewShotProbe.of(self.items)
        return items.fingerprint, {"items_fingerprint": items.fingerprint, "shots": list(items.probes)}

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> FewShotResult:
        network, items = self._network, self.items
        assert network is not None
        assert isinstance(items, FewShotProbe)
        with trainer.precision_plugin.forward_context():
            return evaluate_few_shot(
                network,
                items,
                self.max_new_tokens,
                self.batch_size,
                forward=forward_through_strategy(trainer, pl_module, network),
                distributed=trainer.world_size > 1,
                progress=self._bar_title(trainer),
            )

    def _values(self, result: FewShotResult) -> dict[str, float]:
        values = {}
        for count, by_task in result.scores.items():
            for task, score in by_task.items():
                below = f"/{task}" if task else ""
                values[f"{self.name}/em_{count}{below}"] = score.exact_match
                values[f"{self.name}/f1_{count}{below}"] = score.f1
        return values

    def _point(self, result: FewShotResult, step: int) -> dict[str, Any]:
        return {"step": step, "seconds": result.seconds, **self._values(result)}

    def _draw(self, trainer: pl.Trainer, result: FewShotResult) -> None:
        """Curves are for the loggers."""
