"""What our metrics share: states that stay float64 wherever they go, and axes to plot into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class PreciseMetric(Metric):
    """Moves between devices with ``to``, ``half`` and their kin, but never changes the precision of its states."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)


def figure_and_axes(axes: Axes | None) -> tuple[Figure | None, Axes]:
    """``None`` and the axes given, or a new pyplot figure and its axes.

    Raises:
        ModuleNotFoundError: without matplotlib; it names the extra.
    """
    if axes is not None:
        return None, axes
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot needs matplotlib: pip install 'mir-lightning[recipes]'.") from error
    figure = pyplot.figure()
    return figure, figure.add_subplot()
