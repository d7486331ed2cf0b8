"""A metric whose float64 states stay float64 wherever it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric


class PreciseMetric(Metric):
    """Moves between devices with ``to``, ``half`` and their kin, but never changes the precision of its states."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        """Follow ``fn`` to its device but keep the states' precision."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)
