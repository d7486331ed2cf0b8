"""What our metrics share: states that stay float64 wherever they go, and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

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

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric has seen; what was computed before is forgotten."""
        super().merge_state(incoming_state)
        self._computed = None

    def plot(
        self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None
    ) -> tuple[Figure | None, Axes]:
        """Draw everything seen, or the metric over time.

        Args:
            val: a result of ``compute`` or ``forward``, or a sequence of them: the metric over time; ``None``:
                the parts of everything seen (layers of MIR and their gaps; tasks of SDS and their chance levels;
                samples of the image gain).
            ax: axes to draw into instead of a new figure.

        Returns:
            The figure (``None`` with ``ax``) and its axes.

        Raises:
            ModuleNotFoundError: without matplotlib; it names the extra.
        """
        if val is not None:
            return cast("tuple[Figure, Axes]", self._plot(val, ax))
        figure = None
        if ax is None:
            try:
                from matplotlib import pyplot
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "plot needs matplotlib: pip install 'mir-lightning[recipes]'."
                ) from error
            figure = pyplot.figure()
            ax = figure.add_subplot()
        self._draw(ax)
        ax.legend()
        return figure, ax

    def _draw(self, ax: Axes) -> None:
        raise NotImplementedError
