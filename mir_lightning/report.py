"""One page about one or several runs: their curves side by side, and which of them go with a downstream score."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torchmetrics.functional import spearman_corrcoef

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Curve = list[tuple[int, float]]

_STEP_KEYS = ("step", "trainer/global_step", "global_step")
_RESAMPLES = 2000
# Panels by title: the names whose curves they show, in this order; a trailing "/" takes all directly below.
_PANELS: dict[str, tuple[str, ...]] = {
    "Modality Integration Rate": ("mir", "mir_robust"),
    "Soft Discrimination Score": ("sds/", "sds"),
    "Accuracy": ("acc/", "acc"),
    "Loss": ("train/loss", "loss", "mir_probe/loss"),
    "Held-out perplexity": ("mir_probe/perplexity",),
    "Few-shot exact match": ("few_shot/em_0", "few_shot/em_4", "few_shot/em_8"),
    "Effective rank": ("mir_rank/vision", "mir_rank/text"),
    "Share of massive tokens": ("mir_massive/vision", "mir_massive/text"),
}
_PANELS_OF_CHOICES = ("Soft Discrimination Score", "Accuracy")


@dataclass(frozen=True)
class Run:
    """What a run logged.

    Attributes:
        name: of the run.
        curves: values over optimizer steps, by the name they were logged under.
    """

    name: str
    curves: Mapping[str, Curve]


class Correlation(NamedTuple):
    """Rank correlation of a metric's last values with a downstream score.

    Attributes:
        metric: name of the metric.
        rho: Spearman's coefficient.
        low: lower end of its bootstrap interval (95 %).
        high: upper end.
        runs: number of runs that have both.
    """

    metric: str
    rho: float
    low: float
    high: float
    runs: int


def read_run(path: Path) -> Run:
    """The curves of a run's folder or file: Lightning's ``metrics.csv``, or a Hugging Face ``trainer_state.json``.

    Of a folder the newest such file below it is read, and before it those of a run that was resumed: each began at
    an earlier step. Where a step was run again, the later value counts. The folder's name is the run's.

    Raises:
        ValueError: if there is none, or it holds no curve.
    """
    files = _newest_first(path) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path} is no run: there is no metrics.csv and no trainer_state.json.")
    pieces = [_curves(files[0])]
    if not pieces[0]:
        raise ValueError(f"{files[0]} holds no curve.")
    if files[0].suffix == ".csv":  # a trainer_state.json holds the whole run
        for file in files[1:]:
            if not (earlier := _curves(file)):
                continue
            if _first_step(earlier) >= _first_step(pieces[-1]):
                break  # of another run, in the same folder before
            pieces.append(earlier)
    curves: dict[str, dict[int, float]] = {}
    for piece in reversed(pieces):
        for name, curve in piece.items():
            curves.setdefault(name, {}).update(curve)
    folder = path if path.is_dir() else path.parent
    return Run(folder.resolve().name, {name: sorted(curve.items()) for name, curve in curves.items()})


def _curves(file: Path) -> dict[str, Curve]:
    rows = _json_rows(file) if file.suffix == ".json" else list(csv.DictReader(file.open(newline="")))
    curves: dict[str, Curve] = {}
    for row in rows:
        step = next((row[key] for key in _STEP_KEYS if row.get(key) not in (None, "")), None)
        for name, value in row.items():
            number = _number(value)
            if step is not None and number is not None and name not in (*_STEP_KEYS, "epoch"):
                curves.setdefault(name, []).append((int(float(step)), number))
    return curves


def _first_step(curves: Mapping[str, Curve]) -> int:
    return min(step for curve in curves.values() for step, _ in curve)


def _newest_first(folder: Path) -> list[Path]:
    found = [*folder.glob("**/metrics.csv"), *folder.glob("**/trainer_state.json")]
    newest = sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)
    return [file for file in newest if file.suffix == newest[0].suffix]


def _json_rows(file: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(file.read_text("utf-8"))["log_history"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no trainer_state.json: {error!r}.") from error
    return list(rows)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def report_figure(runs: Sequence[Run]) -> Figure:
    """Panels side by side: every metric that some run has, a colour for each run, a line style for each name."""
    from matplotlib.figure import Figure

    panels = {title: names for title, keys in _PANELS.items() if (names := _names_of(runs, keys))}
    columns = min(3, len(panels)) or 1
    lines = -(-len(panels) // columns) or 1
    figure = Figure(figsize=(4.2 * columns, 3.0 * lines), dpi=120, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for place, (title, names) in enumerate(panels.items()):
        _draw_panel(axes[place // columns][place % columns], title, names, runs)
    for place in range(len(panels), lines * columns):
        axes[place // columns][place % columns].set_axis_off()
    if len(runs) > 1:
        handles = [_line(f"C{colour}", "-", run.name) for colour, run in enumerate(runs)]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 6), frameon=False)
    return figure


def _line(colour: str, style: Any, label: str) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, label=label)


def _names_of(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    logged = sorted({name for run in runs for name in run.curves})
    chosen: list[str] = []
    for key in keys:
        if key.endswith("/"):
            chosen += [name for name in logged if name.startswith(key) and "/" not in name[len(key) :]]
        elif key in logged and not any(name.startswith(f"{key}/") for name in chosen):
            chosen.append(key)
    return chosen


def _draw_panel(axes: Any, title: str, names: Sequence[str], runs: Sequence[Run]) -> None:
    styles = ("-", "--", ":", "-.")
    for colour, run in enumerate(runs):
        for style, name in enumerate(names):
            if curve := run.curves.get(name):
                axes.plot(
                    *zip(*curve, strict=True),
                    color=f"C{colour if len(runs) > 1 else style}",
                    linestyle=styles[style % len(styles)] if len(runs) > 1 else "-",
                    marker="o" if len(curve) <= 20 else None,
                    markersize=3,
                    linewidth=1.2,
                )
    if title in _PANELS_OF_CHOICES:
        _draw_chance(axes, names, runs)
    axes.set(title=title, xlabel="optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    several = len(runs) > 1
    handles = [
        _line("0.3" if several else f"C{style}", styles[style % len(styles)] if several else "-", name)
        for style, name in enumerate(names if len(names) > 1 else ())
    ]
    handles += axes.get_legend_handles_labels()[0]
    if handles:
        axes.legend(handles=handles, frameon=False, fontsize=7)


def _draw_chance(axes: Any, names: Sequence[str], runs: Sequence[Run]) -> None:
    """What guessing gives, for each of the names: it differs by ability."""
    keys = {"/".join(["sds_chance", *name.split("/")[1:]]) for name in names}
    levels = {run.curves[key][-1][1] for run in runs for key in keys & run.curves.keys()}
    for place, level in enumerate(sorted(levels)):
        label = None if place else "chance"
        axes.axhline(level, color="grey", linewidth=0.8, linestyle=(0, (1, 2)), label=label)


def correlations(runs: Sequence[Run], scores: Mapping[str, float], seed: int = 0) -> list[Correlation]:
    """Spearman's rank correlation of each metric's last value with a downstream score, over runs.

    The interval is the 2.5 to 97.5 percentile over resampled runs (bootstrap); resamples in which one side does
    not vary say nothing and are left out.

    Args:
        runs: three at least.
        scores: downstream score by the name of the run.
        seed: of the resampling.

    Raises:
        ValueError: for fewer than three runs with a score, or two of one name.
    """
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"two runs have one name: {', '.join(sorted(names))}.")
    scored = [run for run in runs if run.name in scores]
    if len(scored) < 3:
        raise ValueError(f"rank correlations need three runs with a score, got {len(scored)} of {len(runs)}.")
    shown = [name for keys in _PANELS.values() for name in _names_of(scored, keys)]
    rows = []
    for metric in dict.fromkeys(shown):
        having = [run for run in scored if metric in run.curves]
        last = torch.tensor([run.curves[metric][-1][1] for run in having], dtype=torch.float64)
        score = torch.tensor([scores[run.name] for run in having], dtype=torch.float64)
        if len(having) >= 3 and len(last.unique()) > 1 and len(score.unique()) > 1:
            rows.append(Correlation(metric, _spearman(last, score), *_interval(last, score, seed), len(having)))
    return sorted(rows, key=lambda row: -abs(row.rho))


def _spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(spearman_corrcoef(a, b))


def _interval(a: torch.Tensor, b: torch.Tensor, seed: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(_RESAMPLES):
        chosen = torch.randint(len(a), (len(a),), generator=generator)
        if len(a[chosen].unique()) > 1 and len(b[chosen].unique()) > 1:
            found.append(_spearman(a[chosen], b[chosen]))
    low, high = torch.tensor(found, dtype=torch.float64).quantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64)
    )
    return float(low), float(high)


def correlation_table(rows: Sequence[Correlation], score: str) -> str:
    """The correlations as text."""
    width = max(len("metric"), *(len(row.metric) for row in rows)) if rows else len("metric")
    lines = [f"{'metric':<{width}}  rho with {score}, 95 % interval, runs"]
    lines += [
        f"{row.metric:<{width}}  {row.rho:>6.2f}  [{row.low:>5.2f}, {row.high:>5.2f}]  {row.runs}" for row in rows
    ]
    return "\n".join(lines)


def report_page(runs: Sequence[Run], figure: Figure, rows: Sequence[Correlation], score: str) -> str:
    """An HTML page that needs nothing else: the curves as a drawing, last values and correlations as tables."""
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg")
    svg = drawing.getvalue()
    names = [name for keys in _PANELS.values() for name in _names_of(runs, keys)]
    last = [
        [name, *(f"{run.curves[name][-1][1]:.4g}" if name in run.curves else "" for run in runs)] for name in names
    ]
    tables = f"<h2>Last values</h2>{_html_table(['', *(run.name for run in runs)], last)}"
    if rows:
        body = [[r.metric, f"{r.rho:.2f}", f"{r.low:.2f} to {r.high:.2f}", str(r.runs)] for r in rows]
        head = ["metric", "Spearman's rho", "95 % interval (bootstrap)", "runs"]
        tables += f"<h2>Rank correlation with {html.escape(score)}</h2>{_html_table(head, body)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Runs</title><style>'
        "body{font-family:sans-serif;margin:2em auto;max-width:80em;padding:0 1em}svg{max-width:100%;height:auto}"
        "table{border-collapse:collapse}th,td{padding:.2em .8em;border-bottom:1px solid #ccc;text-align:right}"
        "th:first-child,td:first-child{text-align:left}</style></head><body>"
        f"<h1>{html.escape(', '.join(run.name for run in runs))}</h1>"
        f"{svg[svg.index('<svg') :]}{tables}</body></html>"
    )


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
