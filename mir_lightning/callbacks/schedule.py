"""When a probe is due: steps, geometric steps, epochs, or tokens trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mir_lightning.functional.checks import check_at_least_one


@dataclass(frozen=True)
class Schedule:
    """Points of a training run; a probe is due at any of them.

    Args:
        every_n_steps: optimizer steps between points.
        at_steps: single optimizer steps.
        growth: geometric points, 1, 2, ... steps and then each about ``growth`` times the last.
        every_n_epochs: training epochs between points.
        every_n_tokens: tokens trained on between points, over all ranks, padding left out.

    Raises:
        ValueError: for an interval or a step below 1, or a growth not above 1.
    """

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
    """Tokens of a training batch: of its ``attention_mask``, or all ``input_ids`` without one.

    Raises:
        ValueError: if the batch has neither.
    """
    if isinstance(batch, Mapping):
        for key in ("attention_mask", "input_ids"):
            if isinstance(value := batch.get(key), Tensor):
                return int(value.sum()) if key == "attention_mask" else value.numel()
    keys = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(f'every_n_tokens counts "attention_mask" or "input_ids" of training batches, got {keys}.')
