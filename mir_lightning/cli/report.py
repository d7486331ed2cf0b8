"""``mir-lightning report``: one page about one or several runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mir_lightning.cli.probe import Parsers
from mir_lightning.report import Run, correlation_table, correlations, read_run, report_figure, report_page


def add_parser(commands: Parsers, parents: list[argparse.ArgumentParser]) -> None:
    """The ``report`` command."""
    parser = commands.add_parser(
        "report",
        parents=parents,
        help="one page about runs: MIR, SDS, loss, perplexity and in-context curves",
        description="Curves of runs side by side; with --score, how well each metric ranks the runs as that does.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder, metrics.csv or trainer_state.json of a run"
    )
    parser.add_argument(
        "--score",
        help="downstream score of each run: a .json file of run names and numbers, or the name of a logged metric",
    )
    parser.add_argument("--html", type=Path, help="write a page that opens offline")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file (.png, .pdf, .svg)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    runs = [read_run(path) for path in options.runs]
    figure = report_figure(runs)
    rows = correlations(runs, _scores(options.score, runs)) if options.score else []
    rows = [row for row in rows if row.metric != options.score]
    for run in runs:
        values = ", ".join(
            f"{n} {run.curves[n][-1][1]:.4g}" for n in ("mir", "sds", "train/loss") if n in run.curves
        )
        print(f"{run.name}: {values or f'{len(run.curves)} curves'}")
    if options.score:
        print(correlation_table(rows, options.score))
    if options.html:
        options.html.write_text(report_page(runs, figure, rows, options.score or ""), encoding="utf-8")
    if options.plot:
        figure.savefig(options.plot)


def _scores(score: str, runs: Sequence[Run]) -> Mapping[str, float]:
    """From a file, or the last values of a metric."""
    if score.endswith(".json"):
        scores = json.loads(Path(score).read_text("utf-8"))
        if not isinstance(scores, dict) or not all(isinstance(v, (int, float)) for v in scores.values()):
            raise ValueError(f"{score} must hold an object of run names and numbers.")
        return scores
    found = {run.name: run.curves[score][-1][1] for run in runs if score in run.curves}
    if not found:
        raise ValueError(f"score: no run has logged {score!r}, and it is no .json file.")
    return found
