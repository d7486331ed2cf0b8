"""``mir-lightning report``: one page about one or several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

from mir_lightning import report
from mir_lightning.cli.options import Command, option, output_file, picture_file
from mir_lightning.files import check_json, read_json


@dataclass(kw_only=True)
class Report(Command):
    """Curves of runs side by side; with --score, how well each metric ranks the runs as that does."""

    runs: list[Path] = option("folder, metrics.csv or trainer_state.json", MISSING, metavar="RUN", nargs="+")
    score: str | None = option(
        "downstream score: a .json file of run names and numbers, or a logged metric's name"
    )
    html: Path | None = option("write a page that opens offline", type=output_file)
    plot: Path | None = option("draw the curves into this file (.png, .pdf, .svg)", type=picture_file)

    def run(self) -> None:
        """Read, write, print."""
        runs = [report.read_run(path) for path in self.runs]
        rows = report.correlations(runs, _scores(self.score, runs)) if self.score else []
        rows = [row for row in rows if row.metric != self.score]
        figure = report.report_figure(runs)
        if self.html:
            page = report.report_page(runs, figure, rows, self.score or "")
            self.html.write_text(page, encoding="utf-8", errors="backslashreplace")
        if self.plot:
            figure.savefig(self.plot)
        for run in runs:
            shown = [name for name in ("mir", "sds", "train/loss") if name in run.curves]
            values = ", ".join(f"{name} {run.last(name):.4g}" for name in shown)
            print(f"{run.name}: {values or f'{len(run.curves)} curves'}")
        if self.score:
            print(report.text_table(*report.correlation_table(rows, self.score)))


def _scores(score: str, runs: Sequence[report.Run]) -> Mapping[str, float]:
    """From a file, or the last values of a metric."""
    if score.lower().endswith(".json"):
        scores = read_json(score)
        schema = dict.fromkeys(scores, float) if isinstance(scores, dict) else {}
        check_json(f"{score} must hold an object of run names and numbers", scores, schema)
        return scores
    found = {run.name: run.last(score) for run in runs if score in run.curves}
    if not found:
        raise ValueError(f"score: no run has logged {score!r}, and it is no .json file.")
    return found
