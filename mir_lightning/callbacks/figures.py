"""Pictures and tables of evaluations."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from mir_lightning.functional.mir import judge, kept_by, norms_of
from mir_lightning.probing.evaluate import MIRResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

# Okabe and Ito: told apart with any colour vision.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
_MEAN_COLOUR, _COV_COLOUR = _COLOURS[:2]


def curve_colour(index: int) -> str:
    """Of the curve of that number; the first eight differ."""
    return _COLOURS[index % len(_COLOURS)]


def new_figure(
    width: float = 6.4, height: float = 3.6, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    """An empty figure, in inches; an ``ImportError`` without matplotlib names the extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "mir-lightning[recipes]"') from error
    return Figure(figsize=(width, height), dpi=120, layout=layout)


def _panel(right: float = 0.97) -> tuple[Figure, Axes]:
    """A figure of one pair of axes, in fixed margins: to find them takes as long as to draw it, at every point."""
    figure = new_figure(layout=None)
    figure.subplots_adjust(left=0.14, right=right, bottom=0.14, top=0.9)
    return figure, figure.subplots()


def _dress(axes: Axes, whole_numbers: str = "", columns: int = 1, **labels: Any) -> None:
    """Labels, title, a legend if anything has a label; only whole numbers on the axes ``"x"`` or ``"y"``."""
    from matplotlib.ticker import MaxNLocator

    axes.set(**labels)
    if axes.get_yscale() == "linear":
        axes.ticklabel_format(axis="y", scilimits=(-2, 4))  # else wide numbers leave the picture
    for name in whole_numbers:
        getattr(axes, f"{name}axis").set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, ncols=columns, columnspacing=1, handlelength=1.2)
    axes.spines[["top", "right"]].set_visible(False)


def draw_band(axes: Axes, points: Iterable[Sequence[float]], colour: str) -> None:
    """The 95 % interval of points (step, value, standard error)."""
    if bounds := [(step, value - 1.96 * error, value + 1.96 * error) for step, value, error in points]:
        steps, low, high = zip(*bounds, strict=True)
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def overview_figure(points: Sequence[Mapping[str, float]], result: MIRResult, step: int) -> Figure:
    """Does the model look, are the modalities apart, and by what: gain, MIR, and the last point's layers.

    ``points`` are readings by step, see :mod:`~mir_lightning.callbacks.alarms`.
    """
    figure = new_figure(11.0, 3.6, layout=None)
    grid = figure.add_gridspec(2, 3, left=0.07, right=0.985, bottom=0.14, top=0.89, wspace=0.25, hspace=0.35)
    gain, mir = (figure.add_subplot(grid[:, column]) for column in (0, 1))
    gaps, ratio = (figure.add_subplot(grid[row, 2]) for row in (0, 1))
    for axes, name, colour, labels in (
        (gain, "gain", _MEAN_COLOUR, ("Does it look? Image gain", "nats a token (higher is better)")),
        (mir, "mir", _COV_COLOUR, ("Are the modalities apart? MIR", "log10 distance (lower is better)")),
    ):
        taken = [point for point in points if name in point]
        axes.plot([p["step"] for p in taken], [p[name] for p in taken], "o-", markersize=3, color=colour)
        sure = (point for point in taken if f"{name}_error" in point)
        draw_band(axes, ((p["step"], p[name], p[f"{name}_error"]) for p in sure), colour)
        _dress(axes, "x", xlabel="optimizer step", title=labels[0], ylabel=labels[1])
        if not taken:
            axes.text(0.5, 0.5, "not measured:\nadd ImageGainCallback", ha="center", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
        elif name == "gain":
            axes.axhline(0, color="grey", linewidth=0.8)
    _draw_gaps(gaps, result.mean_gap, result.cov_gap)
    gaps.margins(y=0.4)  # room for the legend
    _dress(gaps, "x", columns=2, title=f"By what? Layers at step {step}", ylabel="distance")
    ratio.plot(range(1, len(result.norm_ratio) + 1), result.norm_ratio, color="black", linewidth=1.4)
    ratio.axhline(1, color="grey", linewidth=0.8)
    _dress(ratio, "x", xlabel="decoder layer", ylabel="norm ratio", ylim=(0, None))
    return figure


def _draw_gaps(axes: Axes, mean_gap: Any, cov_gap: Any) -> None:
    layers = range(1, len(mean_gap) + 1)
    axes.bar(layers, mean_gap, color=_MEAN_COLOUR, label="mean gap", width=0.85)
    axes.bar(layers, cov_gap, bottom=mean_gap, color=_COV_COLOUR, label="covariance gap", width=0.85)


def layer_figure(result: Mapping[str, Any], title: str) -> Figure:
    """Fréchet distance by layer, split into mean gap and covariance gap, of the fields of a result."""
    figure, axes = _panel()
    _draw_gaps(axes, result["mean_gap"], result["cov_gap"])
    limits = (0.4, len(result["mean_gap"]) + 0.6)
    _dress(axes, "x", xlabel="decoder layer", ylabel="Fréchet distance", title=title, xlim=limits)
    return figure


def layer_comparison_figure(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Fréchet distance by layer of several models, by name."""
    figure, axes = _panel()
    for (name, layers), marker in zip(curves.items(), itertools.cycle("os^Dv<>P")):
        axes.plot(range(1, len(layers) + 1), layers, marker=marker, markersize=4, linewidth=1.2, label=name)
    if all(value > 0 for layers in curves.values() for value in layers):
        axes.set_yscale("log")
    _dress(axes, "x", xlabel="decoder layer", ylabel="Fréchet distance")
    axes.legend(handles=axes.lines, frameon=False)  # names that begin with "_" too
    return figure


def heatmap_figure(steps: Sequence[int], layers: Sequence[Sequence[float]]) -> Figure:
    """Fréchet distance by layer and step: where in the model alignment happens, and when."""
    from matplotlib.colors import LogNorm

    figure, axes = _panel(right=0.94)
    columns = list(zip(*layers, strict=True))
    positive = [value for row in columns for value in row if value > 0]
    norm = LogNorm(min(positive), max(positive)) if positive and min(positive) < max(positive) else None
    extent = (-0.5, len(steps) - 0.5, 0.5, len(columns) + 0.5)
    image = axes.imshow(columns, aspect="auto", origin="lower", norm=norm, interpolation="nearest", extent=extent)
    shown = range(0, len(steps), max(1, -(-len(steps) // 10)))
    axes.set_xticks(list(shown), [str(steps[i]) for i in shown])
    title = "Fréchet distance of vision and text"
    _dress(axes, "y", xlabel="optimizer step", ylabel="decoder layer", title=title)
    figure.colorbar(image, label="Fréchet distance")
    return figure


def token_figure(result: MIRResult, step: int) -> Figure:
    """Vision and text tokens of one layer on the first two principal components of both; without outliers."""
    norms = [norms_of(part) for part in result.sample]
    kept = [part[kept_by("robust", judge(n).classes(n))] for part, n in zip(result.sample, norms, strict=True)]
    tokens = torch.cat(kept)
    centred = tokens - tokens.mean(dim=0)
    _, deviations, directions = torch.linalg.svd(centred, full_matrices=False)
    plane = (centred @ directions[:2].T).numpy()
    shares = (deviations.square() / deviations.square().sum().clamp(min=1e-300))[:2].tolist()
    figure, axes = _panel()
    vision = len(kept[0])
    for part, colour, marker, label in (
        (plane[:vision], _MEAN_COLOUR, "o", "vision tokens"),
        (plane[vision:], _COV_COLOUR, "^", "text tokens"),
    ):
        x, y = part[:, 0], part[:, -1]
        axes.scatter(x, y, s=9, alpha=0.6, linewidths=0, color=colour, marker=marker, label=label)
    _dress(
        axes,
        xlabel=f"first component ({shares[0]:.0%} of the variance)",
        ylabel=f"second component ({shares[-1]:.0%})",
        title=f"Step {step}: tokens after layer {result.sample_layer} of {len(result.layers)}",
    )
    return figure


def ability_figure(steps: Sequence[int], scores: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Soft Discrimination Score over steps: by ability, at each step the score and its chance level."""
    figure, axes = _panel()
    for index, (ability, points) in enumerate(scores.items()):
        axes.plot(steps, [point[0] for point in points], "o-", color=curve_colour(index), label=ability)
        axes.plot(
            steps, [point[1] for point in points], ":", color=curve_colour(index), label=f"{ability}: chance"
        )
    title = "Right answers against distractors"
    _dress(axes, xlabel="optimizer step", ylabel="Soft Discrimination Score", title=title)
    return figure


def gain_figure(points: Sequence[Sequence[float]]) -> Figure:
    """Image gain with its 95 % interval, of points ``(step, gain, error, gain over blank, error, ...)``."""
    figure, axes = _panel()
    steps, *columns = zip(*points, strict=True)
    for index, colour, style, label in (
        (0, _MEAN_COLOUR, "o-", "over another sample's picture"),
        (2, _COV_COLOUR, "s--", "over a blank picture"),
    ):
        gains, errors = columns[index : index + 2]
        axes.plot(steps, gains, style, color=colour, markersize=4, label=label)
        draw_band(axes, zip(steps, gains, errors, strict=True), colour)
    axes.axhline(0, color="black", linewidth=0.8)
    title = "Does the model look? Higher is better; 0: it does not"
    _dress(axes, "x", xlabel="optimizer step", ylabel="image gain (nats a token)", title=title)
    return figure


def caption_figure(
    images: Sequence[Image], captions: Sequence[str], references: Sequence[str], step: int = 0, title: str = ""
) -> Figure:
    """Pictures, eight in a row, with what the model writes about each, and in grey the reference."""
    columns, lines = min(8, len(images)), -(-len(images) // 8)
    figure = new_figure(2.6 * columns, 4.0 * lines)
    panels = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=(2, 1) * lines)
    for axes in panels.flatten():
        axes.set_axis_off()
    places = zip(panels[::2].flatten(), panels[1::2].flatten(), strict=True)
    shown = zip(images, captions, references, strict=True)
    for (image, caption, reference), (picture, below) in zip(shown, places, strict=False):
        picture.set_axis_on()
        picture.imshow(image)
        picture.set(xticks=[], yticks=[])
        wrapped = textwrap.wrap(caption.strip() or "(nothing)", 34, max_lines=5)
        grey = "\n".join(textwrap.wrap(reference, 34, max_lines=4))
        look = {"va": "top", "fontsize": 8, "parse_math": False}
        below.text(0, 1, "\n".join(wrapped), **look)
        below.text(0, 0.86 - 0.14 * len(wrapped), grey, color="#767676", **look)
    title = title or f"Step {step}: captions written by the model; in grey, the reference"
    figure.suptitle(textwrap.fill(title, 40 * columns), fontsize=10)
    return figure


def layer_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of all that is known by layer, from the fields of a result."""
    keys = {
        **{"layers": ["distance"], "mean_gap": ["mean gap"], "cov_gap": ["covariance gap"]},
        **{"effective_rank": ["vision rank", "text rank"], "outliers": ["vision outliers", "text outliers"]},
        **{"robust_layers": ["robust distance"], "massive": ["vision massive", "text massive"]},
        **{"norm_ratio": ["norm ratio"]},
    }
    columns = ["layer", *(name for names in keys.values() for name in names)]
    numbers = [torch.as_tensor(result[key]).reshape(len(result["layers"]), -1) for key in keys]
    return columns, [[layer, *row] for layer, row in enumerate(torch.cat(numbers, dim=1).tolist(), start=1)]
