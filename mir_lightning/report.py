"""One page about one or several runs: their curves side by side, and which of them go with a downstream score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mir_lightning.callbacks.figures import curve_colour, draw_band, new_figure
from mir_lightning.files import check_json, finite_number, read_csv, read_json
from mir_lightning.page import Panel, TitledTable, html_page
from mir_lightning.study import Study
from mir_lightning.validation import OVERALL, Design, Estimate, spearman

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = list[tuple[int, float]]

_STEP_KEYS = ("step", "trainer/global_step", "global_step")
_STYLES = ("-", "--", ":", "-.")
# Panels by title: the unit, and the names whose curves they show; a trailing "/" takes all directly below.
_PANELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Does it look? Image gain": ("nats a token (higher is better)", ("image_gain",)),
    "Are the modalities apart? MIR": ("log10 distance (lower is better)", ("mir", "mir_robust")),
    "By what? Norm of vision over text": ("ratio (mean over layers)", ("mir_norm/mean",)),
    "Soft Discrimination Score": ("probability (higher is better)", ("sds_abilities/", "sds")),
    "Accuracy": ("share of items (higher is better)", ("sds_acc_abilities/", "sds_acc")),
    "Loss": ("nats a token (lower is better)", ("train/loss", "loss", "mir_probe/loss")),
    "Held-out perplexity": ("(lower is better)", ("mir_probe/perplexity",)),
    "Few-shot exact match": (
        "share of answers (higher is better)",
        ("few_shot/em_0", "few_shot/em_4", "few_shot/em_8"),
    ),
    "Effective rank": ("dimensions (mean over layers)", ("mir_rank/vision", "mir_rank/text")),
    "Massive tokens": ("share of tokens", ("mir_massive/vision", "mir_massive/text")),
}


@dataclass(frozen=True)
class Run:
    """A run's name, and what it logged: values over optimizer steps, by the name they were logged under."""

    name: str
    curves: Mapping[str, Curve]

    @classmethod
    def of(cls, history: Iterable[Mapping[str, Any]], name: str = "") -> Run:
        """From the history of a probing callback."""
        curves = _of_rows(history, "history")
        return cls(name, {key: sorted(curve.items()) for key, curve in curves.items()})

    def last(self, name: str) -> float:
        """The last value of a curve."""
        return self.curves[name][-1][1]


class Correlation(NamedTuple):
    """Spearman's rank correlation of a metric's last values with a score, over the ``runs`` that have both."""

    metric: str
    rho: Estimate
    runs: int


def read_run(path: Path) -> Run:
    """The curves of a run's folder or file: Lightning's ``metrics.csv``, or a Hugging Face ``trainer_state.json``.

    Of a folder the newest such file below it is read, and before it those of a run that was resumed: each began at
    an earlier step. Where a step was run again, the later value counts. The folder's name is the run's.

    Raises:
        ValueError: if there is none, it is damaged, or it holds no curve.
    """
    folder, files = path.parent, [path]
    if path.is_dir():
        found = [*path.glob("**/metrics.csv"), *path.glob("**/trainer_state.json")]
        newest = sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)
        folder, files = path, [file for file in newest if file.suffix == newest[0].suffix]
    if not files or not files[0].is_file():
        raise ValueError(f"{path} is no run: there is no metrics.csv and no trainer_state.json.")
    pieces = [_curves(files[0])]
    if not pieces[0]:
        raise ValueError(f"{files[0]} holds no curve.")
    for file in files[1:] if files[0].suffix.lower() == ".csv" else ():  # a trainer_state.json holds the whole run
        if not (earlier := _curves(file)):
            continue
        if min(map(min, earlier.values())) >= min(map(min, pieces[-1].values())):
            break  # of another run, in the same folder before
        pieces.append(earlier)
    curves: dict[str, dict[int, float]] = {}
    for piece in reversed(pieces):
        for name, curve in piece.items():
            curves.setdefault(name, {}).update(curve)
    return Run(folder.resolve().name, {name: sorted(curve.items()) for name, curve in curves.items()})


def _curves(file: Path) -> dict[str, dict[int, float]]:
    """Values by step, by name."""
    if file.suffix.lower() == ".json":
        state = read_json(file)
        check_json(f"{file} is no trainer_state.json", state, {"log_history": [{}]})
        rows = state["log_history"]
    else:
        rows = read_csv(file)
    return _of_rows(rows, str(file))


def _of_rows(rows: Iterable[Mapping[str, Any]], source: str) -> dict[str, dict[int, float]]:
    """Values by step, by name, of logged rows."""
    curves: dict[str, dict[int, float]] = {}
    for place, row in enumerate(rows, start=1):
        given = [row[key] for key in _STEP_KEYS if row.get(key) not in (None, "")]
        if not given:
            continue
        step = finite_number(given[0])
        if step is None:
            raise ValueError(f"{source}, row {place}: the step must be a finite number, got {given[0]!r}.")
        for name, value in row.items():
            if name not in (*_STEP_KEYS, "epoch") and (number := finite_number(value)) is not None:
                curves.setdefault(name, {})[int(step)] = number
    return curves


def literal(text: str) -> str:
    """A text that matplotlib shows as it is: what stands between dollar signs would be mathematics."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")  # it cannot show half a character


def report_panels(runs: Sequence[Run]) -> list[Panel]:
    """Of every metric that some run has: a line style for each name, a colour for each run.

    Where there is one run, each name has a colour.
    """
    return [
        Panel(partial(_draw_panel, title=title, names=names, runs=runs))
        for title in _PANELS
        if (names := _names_of(runs, title))
    ]


def report_figure(runs: Sequence[Run]) -> Figure:
    """All panels, three in a line."""
    from matplotlib.lines import Line2D

    panels = report_panels(runs)
    columns = min(3, len(panels)) or 1
    figure = new_figure(4.2 * columns, 3.0 * (-(-len(panels) // columns) or 1))
    grid = figure.add_gridspec(-(-len(panels) // columns) or 1, columns)
    for place, panel in enumerate(panels):
        panel.draw(figure.add_subplot(grid[place // columns, place % columns]))
    if colours := run_colours(runs):
        handles = [Line2D([], [], color=own, label=literal(name)) for name, own in colours.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 6), frameon=False)
    return figure


def run_colours(runs: Sequence[Run]) -> dict[str, str]:
    """Of several runs, by name."""
    return {run.name: curve_colour(index) for index, run in enumerate(runs)} if len(runs) > 1 else {}


def _names_of(runs: Sequence[Run], title: str) -> list[str]:
    """What a panel shows of these runs."""
    logged = sorted({name for run in runs for name in run.curves})
    chosen: list[str] = []
    for key in _PANELS[title][1]:
        if key.endswith("/"):
            chosen += [name for name in logged if name.startswith(key) and "/" not in name[len(key) :]]
        elif key in logged and not any(name.startswith(f"{key}_") and "/" in name for name in chosen):
            chosen.append(key)
    return chosen


def _draw_panel(axes: Any, title: str, names: Sequence[str], runs: Sequence[Run]) -> None:
    from matplotlib.lines import Line2D

    several, handles = len(runs) > 1, []
    for index, name in enumerate(names):
        style: Any = _STYLES[index % len(_STYLES)]
        if len(names) > 1:
            shown = "black" if several else curve_colour(index)
            handles.append(Line2D([], [], color=shown, linestyle=style, label=literal(name)))
        for place, curve in enumerate(run.curves.get(name) for run in runs):
            if curve:
                own, marker = curve_colour(place if several else index), "o" if len(curve) <= 20 else None
                look = {"marker": marker, "markersize": 3, "linewidth": 1.2}
                axes.plot(*zip(*curve, strict=True), style, color=own, **look)
                errors = dict(runs[place].curves.get(f"{name}_se", ()))
                sure = ((step, value, errors[step]) for step, value in curve if step in errors)
                draw_band(axes, sure, own)
    if names[0].startswith("sds"):  # and what guessing gives, for each of the names
        keys = {name.replace("sds_acc", "sds", 1).replace("sds", "sds_chance", 1) for name in names}
        levels = sorted({run.last(key) for run in runs for key in keys & run.curves.keys()})
        grey = {"color": "grey", "linewidth": 0.8, "linestyle": (0, (1, 2)), "label": "chance"}
        handles += [axes.axhline(level, **grey) for level in levels][:1]
    axes.set(title=title, xlabel="optimizer step", ylabel=_PANELS[title][0])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    if handles:
        axes.legend(handles=handles, frameon=False, fontsize=7)


def correlations(runs: Sequence[Run], scores: Mapping[str, float]) -> list[Correlation]:
    """Spearman's rank correlation of each metric's last value with a downstream score, over runs.

    Its interval is :func:`~mir_lightning.validation.interval`'s, each run a configuration of its own: of three
    runs it is the whole range.

    Args:
        runs: three at least.
        scores: downstream score by the name of the run.

    Raises:
        ValueError: for fewer than three runs with a score, or two of one name.
    """
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"two runs have one name: {', '.join(sorted(names))}.")
    scored = [run for run in runs if run.name in scores]
    if len(scored) < 3:
        raise ValueError(f"rank correlations need three runs with a score, got {len(scored)} of {len(runs)}.")
    rows = []
    for metric in dict.fromkeys(name for title in _PANELS for name in _names_of(scored, title)):
        having = [run for run in scored if metric in run.curves]
        pairs = torch.tensor([(run.last(metric), scores[run.name]) for run in having], dtype=torch.float64)
        if len(having) >= 3 and (pairs != pairs[0]).any(dim=0).all():
            each = [run.name for run in having]
            rho = spearman(pairs.unbind(dim=1), Design.of(Study(each, each, pairs[:, 1], {}), OVERALL))
            rows.append(Correlation(metric, rho, len(having)))
    return sorted(rows, key=lambda row: -abs(row.rho.value))


def correlation_table(rows: Sequence[Correlation], score: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the correlations."""
    columns = ["metric", f"Spearman's rho with {score}", "95 % interval", "runs"]
    cells = ((metric, f"{r.value:.2f}", f"{r.low:.2f} to {r.high:.2f}", str(runs)) for metric, r, runs in rows)
    return columns, [list(row) for row in cells]


def report_page(runs: Sequence[Run], rows: Sequence[Correlation], score: str) -> str:
    """The curves as drawings, last values and correlations as tables."""
    names = [name for title in _PANELS for name in _names_of(runs, title)]
    last = [[name, *(f"{run.last(name):.4g}" if name in run.curves else "" for run in runs)] for name in names]
    tables: list[TitledTable] = [("Last values", ["", *(run.name for run in runs)], last)]
    if rows:
        tables.append((f"Rank correlation with {score}", *correlation_table(rows, score)))
    title = ", ".join(run.name for run in runs)
    return html_page(title, report_panels(runs), tables, colours=run_colours(runs))
