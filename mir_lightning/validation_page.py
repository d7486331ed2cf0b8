"""What the validation of a study found, as tables, as JSON and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from mir_lightning.callbacks.figures import curve_colour, new_figure
from mir_lightning.page import Panel, TitledTable
from mir_lightning.report import literal
from mir_lightning.study import BASE, Study, lower_is_better
from mir_lightning.validation import OVERALL, WITHIN, Estimate, Line, Validation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "os^Dv<>P"


def validation_tables(found: Validation, score: str, given: str | None) -> list[TitledTable]:
    """A line for each reading, and one for each reading and factor."""
    extra = [f"rho within at equal {given}"] if given else []
    head = ["reading", "better", "rho within factors", "p", "rho overall", "p", "tau within", "decision accuracy"]
    rows, by_factor = [], []
    for reading in _by_strength(found):
        lines = {line.scope: _cells(line) for line in found.lines if line.reading == reading}
        within, overall = (lines.pop(scope, ["-"] * 7) for scope in (WITHIN, OVERALL))
        noise = f"{found.signal_to_noise[reading]:.1f}".replace("nan", "-")
        shown = [*within[:2], *overall[:2], within[2], overall[3], *within[4 : 4 + len(extra)], noise, overall[-1]]
        rows.append([reading, _way(reading), *shown])
        by_factor += [[reading, factor, *line[:4], *line[5:]] for factor, line in lines.items()]
    own = f"{found.signal_to_noise['score']:.1f}".replace("nan", "-")
    title = f"Readings against {score}, its signal to noise {own}; [95 % interval]"
    factors = ["reading", "factor", "rho", "p", "tau", "decision accuracy", "configurations", "runs"]
    return [(title, [*head, *extra, "signal to noise", "runs"], rows), ("By factor", factors, by_factor)]


def _cells(line: Line) -> list[str]:
    """Spearman, p, Kendall, decision accuracy, partial, configurations, runs."""
    rho, tau, accuracy, partial = map(_shown, (line.spearman, line.kendall, line.decision_accuracy, line.partial))
    return [rho, f"{line.p:.4f}", tau, accuracy, partial, str(line.configurations), str(line.runs)]


def _shown(estimate: Estimate | None) -> str:
    known = estimate is not None and not math.isnan(estimate.value)
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]" if estimate and known else "-"


def _way(reading: str) -> str:
    return "lower" if lower_is_better(reading) else "higher"


def _by_strength(found: Validation) -> list[str]:
    """Readings, by their correlation within factors."""
    strength = dict.fromkeys((line.reading for line in found.lines), 0.0)
    strength |= {line.reading: abs(line.spearman.value) for line in found.lines if line.scope == WITHIN}
    return sorted(strength, key=lambda name: -strength[name] if strength[name] > 0 else 0.0)  # NaN last, too


def validation_record(found: Validation, score: str, given: str | None) -> dict[str, Any]:
    """Everything as JSON has it; null where there is nothing to rank, or no second seed."""
    lines = [{**asdict(line), "better": _way(line.reading)} for line in found.lines]
    record = {"score": score, "given": given, "lines": lines, "notes": found.notes}
    everything = json.dumps({**record, "signal_to_noise": found.signal_to_noise})
    return json.loads(everything, parse_constant=lambda name: None)


def validation_figure(study: Study, found: Validation, score: str) -> Figure:
    """Rank correlations with their intervals, and the strongest readings against the score."""
    readings = _by_strength(found)
    columns, lines = min(3, len(readings)), 1 + (len(readings) > 3)
    figure = new_figure(5.2 + 2.6 * columns, max(2.8 * lines, 1.8 + 0.42 * len(readings)))
    grid = figure.add_gridspec(lines, 1 + columns, width_ratios=(1.4, *[1] * columns))
    forest, *scatters = validation_panels(study, found, score)
    forest.draw(figure.add_subplot(grid[:, 0]))
    for index, scatter in enumerate(scatters):
        scatter.draw(axes := figure.add_subplot(grid[index // columns, 1 + index % columns]))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4 if columns < 3 else 8, frameon=False)
    return figure


def validation_panels(study: Study, found: Validation, score: str) -> list[Panel]:
    """Those correlations, and each of the six strongest readings against the score."""
    readings = _by_strength(found)
    forest = partial(_draw_forest, lines=found.lines, readings=readings)
    return [
        Panel(forest, width=5.2, height=1.8 + 0.42 * len(readings)),
        *(Panel(partial(_draw_scatter, study=study, reading=name, score=score)) for name in readings[:6]),
    ]


def factor_colours(study: Study) -> dict[str, str]:
    """Of the factors, by name."""
    return {name: curve_colour(index) for index, name in enumerate(study.varied)} | {BASE: "grey"}


def _draw_forest(axes: Any, lines: Sequence[Line], readings: Sequence[str]) -> None:
    for line in lines:
        if line.scope in (WITHIN, OVERALL):
            colour = curve_colour(int(_way(line.reading) == "lower"))
            inside, rho = line.scope == WITHIN, line.spearman
            height = readings.index(line.reading) + (-0.15 if inside else 0.15)
            look = {"color": colour, "linewidth": 2.4 if inside else 1.0}
            axes.plot([rho.low, rho.high], [height] * 2, **look)
            axes.plot(rho.value, height, "o" if inside else "|", markersize=6 if inside else 11, **look)
    names = [literal(f"{name}\n({_way(name)} is better)") for name in readings]
    axes.set_yticks(range(len(readings)), names, fontsize=8)
    axes.set(xlim=(-1.05, 1.05), ylim=(len(readings) - 0.5, -0.5), xlabel="Spearman's rho with 95 % interval")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("dot: within factors; bar: overall\nblue should be right of 0, orange left", fontsize=9)


def _draw_scatter(axes: Any, study: Study, reading: str, score: str) -> None:
    for index, (factor, colour) in enumerate(factor_colours(study).items()):
        rows = [place for place, own in enumerate(study.factors) if own == factor]
        look: Any = {"color": colour, "marker": "*" if factor == BASE else _MARKERS[index % len(_MARKERS)]}
        points = study.readings[reading][rows], study.score[rows]
        axes.scatter(*points, s=20, linewidths=0, label=literal(factor), **look)
    axes.set_ylabel(literal(score))
    axes.set_title(literal(f"{reading} ({_way(reading)} is better)"), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
