"""When a probe is due, and whether one more evaluation is worth its time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mir_lightning.functional.checks import check_at_least_one


@dataclass(frozen=True)
class Schedule:
    """Points of a training run, at any of which a probe is due; options as ``ProbingCallback`` has them."""

    every_n_steps: int | None = None
    at_steps: Sequence[int] = ()
    growth: float | None = None
    every_n_epochs: int | None = None
    every_n_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("every_n_steps", "every_n_epochs", "every_n_tokens"):
            if (value := getattr(self, name)) is not None:
                check_at_least_one(**{name: value})
        if self.at_steps and min(self.at_steps) < 1:
            raise ValueError(f"at_steps must be 1 or more (at_start is step 0), got {min(self.at_steps)}.")
        if self.growth is not None and not self.growth > 1:
            raise ValueError(f"growth must be above 1, got {self.growth}.")

    def due_at_step(self, step: int) -> bool:
        """Whether an optimizer step, counted from 1, is a point."""
        every = self.every_n_steps is not None and step % self.every_n_steps == 0
        return every or step in self.at_steps or self._geometric(step)

    def due_at_epoch(self, epochs: int) -> bool:
        """Whether the end of training epoch number ``epochs``, counted from 1, is a point."""
        return self.every_n_epochs is not None and epochs % self.every_n_epochs == 0

    def due_at_tokens(self, before: int, after: int) -> bool:
        """Whether a step that took the tokens trained on from ``before`` to ``after`` passed a point."""
        return self.every_n_tokens is not None and before // self.every_n_tokens < after // self.every_n_tokens

    def _geometric(self, step: int) -> bool:
        """A power of ``growth`` lies in ``(step - 1, step]``."""
        if self.growth is None:
            return False
        power = math.floor(math.log(step, self.growth) + 1e-9)
        return math.ceil(self.growth**power - 1e-6) == step


def tokens_of(batch: Any) -> int:
    """Tokens of a batch: of its ``attention_mask``, or all ``input_ids``; a ``ValueError`` without either."""
    if isinstance(batch, Mapping):
        for key in ("attention_mask", "input_ids"):
            if isinstance(value := batch.get(key), Tensor):
                return int(value.sum()) if key == "attention_mask" else value.numel()
    keys = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(f'every_n_tokens counts "attention_mask" or "input_ids" of training batches, got {keys}.')


class Budget:
    """Share of the training time that evaluations take, and whether one more fits into ``max_overhead`` of it."""

    def __init__(self, max_overhead: float | None = None) -> None:
        if max_overhead is not None and not 0 < max_overhead <= 1:
            raise ValueError(f"max_overhead must lie above 0 and up to 1, got {max_overhead}.")
        self.max_overhead = max_overhead
        self.evaluating = 0.0
        self._trained_before = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Training begins, or goes on after a resume."""
        self._trained_before, self._started = self.trained, time.monotonic()

    @property
    def trained(self) -> float:
        """Seconds since training began, evaluations and earlier runs included."""
        now = 0.0 if self._started is None else time.monotonic() - self._started
        return self._trained_before + now

    def restore(self, trained: float, evaluating: float) -> None:
        """Continue the account of an interrupted run."""
        self._trained_before, self.evaluating, self._started = trained, evaluating, None

    def share(self, under_way: float, coming: float = 0.0) -> float:
        """Share of the time, with seconds of an evaluation that is under way, or of one that would come on top."""
        spent = self.evaluating + under_way + coming
        return spent / max(self.trained + coming, spent, 1e-9)

    def refusal(self, coming: float) -> str | None:
        """Why one more evaluation of ``coming`` seconds would be too much; ``None`` where it would not."""
        share = self.share(0.0, coming)
        if self.max_overhead is None or share <= self.max_overhead:
            return None
        return (
            f"with it, evaluations would have taken {share:.1%} of the training time, above "
            f"max_overhead={self.max_overhead:.1%}"
        )
