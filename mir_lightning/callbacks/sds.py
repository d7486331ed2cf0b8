"""``SDSCallback``: what the model can do yet, perception or reasoning, at points of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mir_lightning.callbacks import figures
from mir_lightning.callbacks.base import ProbingCallback
from mir_lightning.callbacks.loops import Drawing
from mir_lightning.functional.checks import check_at_least_one, check_choice
from mir_lightning.metrics.sds import SoftDiscriminationScore
from mir_lightning.probing.choices.evaluate import ChoiceResult, evaluate_choices
from mir_lightning.probing.choices.probe import ChoiceProbe, made_of
from mir_lightning.probing.choices.scores import Score

_LEVELS = ("", "_abilities/", "_tasks/", "_parts/")  # of the breakdown: no name is the folder of another


class SDSCallback(ProbingCallback):
    """Evaluate the Soft Discrimination Score (RADAR, arXiv 2602.12892) of the model in training.

    Logged to every logger of the Trainer, and set in ``trainer.callback_metrics`` (so that
    ``ModelCheckpoint(monitor="sds_abilities/perception", mode="max")`` works): ``sds``,
    ``sds_abilities/<ability>``, ``sds_tasks/<ability>/<task>`` and ``sds_parts/<ability>/<task>/<part>``; the
    accuracies ``sds_acc``, ``sds_acc_abilities/<ability>``, ..., and the chance levels ``sds_chance``, ... The
    picture ``sds_media/abilities`` goes to the loggers.

    Args:
        items: a :class:`~mir_lightning.probing.ChoiceProbe`, or a zero-argument callable that makes one when the
            fit starts.
        every_n_steps: optimizer steps between evaluations; ``None`` for none.
        score: what a candidate's token counts: its raw ``"logit"`` or its ``"logprob"``.
        batch_size: candidates in a forward.
        name: prefix of everything logged; choose another for a second set of items.
        options: when, and what if it fails: of :class:`~mir_lightning.callbacks.base.ProbingCallback`.

    Raises:
        TypeError: when the fit starts, for items of another kind.
    """

    label = "SDS"
    best = "max"
    evaluator = staticmethod(evaluate_choices)

    def __init__(
        self,
        items: ChoiceProbe | Callable[[], ChoiceProbe],
        every_n_steps: int | None = 500,
        score: Score = "logit",
        batch_size: int = 32,
        name: str = "sds",
        **options: Any,
    ) -> None:
        check_choice("score", score, Score)
        check_at_least_one(batch_size=batch_size)
        super().__init__(items, every_n_steps, name=name, **options)
        self.engine = {"score": score, "batch_size": batch_size}

    def make_probe(self, source: ChoiceProbe | Callable[[], ChoiceProbe]) -> ChoiceProbe:
        """The items; a ``ValueError`` for tasks and abilities whose names would be each other's folders."""
        probe = made_of(ChoiceProbe, source)
        for task, ability in probe.tasks.items():
            if "/" in ability or task.count("/") > 1:
                raise ValueError(
                    f'items: ability {ability!r} must hold no "/", and task {task!r} one at most (task/part).'
                )
        SoftDiscriminationScore(probe.tasks)
        return probe

    def values(self, result: ChoiceResult) -> dict[str, float]:
        """Scores, accuracies and chance levels of all items, each ability, task and part."""
        values = {}
        for path, found in result.breakdown.items():
            below = _LEVELS[len(path.split("/")) if path else 0] + path
            for kind, value in (("", found.sds), ("_acc", found.accuracy), ("_chance", found.chance)):
                values[f"{self.name}{kind}{below}"] = value
        return values

    def remembered(self, result: ChoiceResult) -> dict[str, Any]:
        """Whether candidates continued from a shared cache."""
        return {"shared_prefix": result.shared_prefix}

    def draw(self, result: ChoiceResult, step: int) -> Drawing:
        """The abilities over all steps."""
        steps = [point["step"] for point in self.history]
        curves = {
            ability: [
                # A gap where earlier items did not ask for the ability.
                [point.get(f"{self.name}{kind}_abilities/{ability}", math.nan) for kind in ("", "_chance")]
                for point in self.history
            ]
            for ability in result.breakdown
            if ability and "/" not in ability
        }
        rows = [[step, path or "all", *found] for path, found in result.breakdown.items()]
        table = ["step", "items", "sds", "accuracy", "chance", "number"], rows
        return {"abilities": figures.ability_figure(steps, curves)}, table
