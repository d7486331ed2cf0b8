"""``mir-lightning report``: one page about one or several runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

from mir_lightning import page, report
from mir_lightning.cli.options import Command, flags, option, output_file, picture_file
from mir_lightning.files import check_json, read_json
from mir_lightning.study import read_study
from mir_lightning.validation import validate
from mir_lightning.validation_page import (
    factor_colours,
    validation_figure,
    validation_panels,
    validation_record,
    validation_tables,
)


@dataclass(kw_only=True)
class Report(Command):
    """Curves of runs side by side, or how well each metric ranks them: --score of a few, --validate of a study."""

    runs: list[Path] = option("folder, metrics.csv or trainer_state.json", MISSING, metavar="RUN", nargs="+")
    score: str | None = option(
        "downstream score: a .json file of run names and numbers, or a logged metric's name; with --validate "
        "a column (default: score)"
    )
    validate: bool = option("RUN is the table of a study: how far can each reading in it be trusted?", False)
    given: str | None = option("with --validate: what does each reading add to this one?", metavar="READING")
    readings: list[str] | None = option("with --validate: these alone", type=str, metavar="READING", nargs="+")
    json: Path | None = option("with --validate: write everything to this file", type=output_file)
    html: Path | None = option("write a page that opens offline", type=output_file)
    plot: Path | None = option("draw into this file (.png, .pdf, .svg)", type=picture_file)

    def __post_init__(self) -> None:
        """A ``ValueError`` if options of a study are given without one, or several tables of one."""
        super().__post_init__()
        if not self.validate and (other := flags({"given", "readings", "json"} & self.typed)):
            raise ValueError(f"{other} goes with --validate, which reads the table of a study.")
        if self.validate and len(self.runs) > 1:
            raise ValueError(f"--validate reads one table of all runs, got {len(self.runs)} files.")

    def run(self) -> None:
        """Read, write, print."""
        (self._validate if self.validate else self._compare)()

    def _validate(self) -> None:
        score = self.score or "score"
        study = read_study(self.runs[0], score)
        found = validate(study, self.given, self.readings or ())
        tables = validation_tables(found, score, self.given)
        if self.json:
            record = validation_record(found, score, self.given)
            self.json.write_text(json.dumps(record, indent=1, allow_nan=False))
        if self.html:
            panels, colours = validation_panels(study, found, score), factor_colours(study)
            page.write_html(self.html, page.html_page(self.runs[0].stem, panels, tables, found.notes, colours))
        if self.plot:
            validation_figure(study, found, score).savefig(self.plot)
        for title, columns, rows in tables:
            print(f"{title}\n{page.text_table(columns, rows)}\n")
        for note in found.notes:
            print(f"note: {note}")

    def _compare(self) -> None:
        runs = [report.read_run(path) for path in self.runs]
        rows = report.correlations(runs, _scores(self.score, runs)) if self.score else []
        rows = [row for row in rows if row.metric != self.score]
        if self.html:
            page.write_html(self.html, report.report_page(runs, rows, self.score or ""))
        if self.plot:
            report.report_figure(runs).savefig(self.plot)
        for run in runs:
            shown = [name for name in ("mir", "sds", "train/loss") if name in run.curves]
            values = ", ".join(f"{name} {run.last(name):.4g}" for name in shown)
            print(f"{run.name}: {values or f'{len(run.curves)} curves'}")
        if self.score:
            print(page.text_table(*report.correlation_table(rows, self.score)))


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
