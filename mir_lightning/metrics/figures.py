"""Where a metric's ``plot`` draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def subplots() -> tuple[Figure, Axes]:
    """A new pyplot figure and its axes.

    Raises:
        ModuleNotFoundError: without matplotlib; it names the extra.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot needs matplotlib: pip install 'mir-lightning[recipes]'.") from error
    figure = pyplot.figure()
    return figure, figure.add_subplot()
