"""``FewShotCallback``: answers after k examples, the in-context baseline at points of a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mir_lightning.callbacks.base import ProbingCallback
from mir_lightning.functional.checks import check_at_least_one
from mir_lightning.probing.choices.few_shot import FewShotProbe, FewShotResult, evaluate_few_shot
from mir_lightning.probing.choices.probe import made_of


class FewShotCallback(ProbingCallback):
    """Evaluate the few-shot in-context score of the model in training.

    Logged to every logger, and set in ``trainer.callback_metrics``: ``few_shot/em_<k>`` and ``few_shot/f1_<k>``
    (exact match and token F1 after k examples, mean over tasks), by task ``few_shot_tasks/em_<k>/<task>`` and
    ``few_shot_tasks/f1_<k>/<task>``, and by ability, means over its tasks, ``few_shot_abilities/em_<k>/<ability>``
    and ``few_shot_abilities/f1_<k>/<ability>``.

    Args:
        items: a :class:`~mir_lightning.probing.FewShotProbe`, or a zero-argument callable that makes one when the
            fit starts.
        every_n_steps: optimizer steps between evaluations; ``None`` for none.
        max_new_tokens: length of an answer.
        batch_size: answers written at a time.
        name: prefix of everything logged.
        options: when, and what if it fails: of :class:`~mir_lightning.callbacks.base.ProbingCallback`.

    Raises:
        TypeError: when the fit starts, for items of another kind.
    """

    label = "Few-shot"
    best = "max"
    evaluator = staticmethod(evaluate_few_shot)

    def __init__(
        self,
        items: FewShotProbe | Callable[[], FewShotProbe],
        every_n_steps: int | None = 500,
        max_new_tokens: int = 16,
        batch_size: int = 8,
        name: str = "few_shot",
        **options: Any,
    ) -> None:
        check_at_least_one(max_new_tokens=max_new_tokens, batch_size=batch_size)
        super().__init__(items, every_n_steps, name=name, **options)
        self.engine = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}

    def make_probe(self, source: FewShotProbe | Callable[[], FewShotProbe]) -> FewShotProbe:
        """The items."""
        return made_of(FewShotProbe, source)

    def values(self, result: FewShotResult) -> dict[str, float]:
        """Exact match and F1 by number of shots: over all tasks, by task and by ability."""
        values = {}
        for group, found in (("tasks", result.scores), ("abilities", result.abilities)):
            for count, scores in found.items():
                for part, score in scores.items():
                    for kind, value in (("em", score.exact_match), ("f1", score.f1)):
                        place = f"_{group}/{kind}_{count}/{part}" if part else f"/{kind}_{count}"
                        values[self.name + place] = value
        return values
