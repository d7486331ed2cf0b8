"""``mir-lightning compare``: several results or models on one probe, side by side."""

from __future__ import annotations

import gc
import inspect
from dataclasses import MISSING, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mir_lightning.callbacks import figures
from mir_lightning.cli.evaluate import evaluate_source, layer_bars
from mir_lightning.cli.options import EvaluationOptions, ProbeOptions, flags, option
from mir_lightning.files import check_json, read_json
from mir_lightning.report import literal, text_table

_MUST_AGREE = {"source": "probe", "variant": "variant", "text": "text positions"}
_OF_MODELS = {name for owner in (ProbeOptions, EvaluationOptions) for name in inspect.get_annotations(owner)} - {
    *("json", "csv", "plot", "no_progress")
}
_NEEDED = {
    **dict.fromkeys(("model", "source", "variant", "text"), str),
    **dict.fromkeys(("mir", "mir_robust"), float),
    **dict.fromkeys(("vision_tokens", "text_tokens"), int),
    "layers": [float],
    "effective_rank": [[float, float]],
}
_PRINTED = {"model": "", "mir": ".4f", "robust": ".4f", "vision rank": ".1f", "text rank": ".1f"}


@dataclass(kw_only=True)
class Compare(EvaluationOptions):
    """Several results or models on one probe: a table sorted by MIR, and their layer curves in one picture."""

    sources: list[str] = option(
        '.json files of "eval --json", or models to evaluate', MISSING, metavar="RESULT_OR_MODEL", nargs="+"
    )
    allow_different: bool = option("compare even results of different probes or variants", False)

    def run(self) -> None:
        """Read or evaluate, write, print."""
        if all(map(_is_result, self.sources)) and (ignored := flags(self.given & _OF_MODELS)):
            raise ValueError(f"{ignored} cannot change results: there is no model to evaluate among the sources.")
        records = sorted(map(self._record, self.sources), key=lambda record: record["mir"])
        differences = []
        for key, name in _MUST_AGREE.items():
            values = {str(record[key]): record["model"] for record in records}
            if len(values) > 1:
                differences.append(
                    f"{name} {', '.join(f'{value[:12]} ({model})' for value, model in values.items())}"
                )
        if differences and not self.allow_different:
            raise ValueError(
                f"these results are not comparable: {'; '.join(differences)}. --allow-different shows them anyway."
            )
        names = [Path(record["model"]).name or record["model"] for record in records]
        if len(set(names)) < len(names):
            names = [record["model"] for record in records]
        named = list(zip(names, records, strict=True))
        rows = [_row(name, record) for name, record in named]
        curves = {literal(f"{name} (MIR {record['mir']:.3f})"): record["layers"] for name, record in named}
        table = [list(rows[0]), *(list(row.values()) for row in rows)]
        self.write(records, table, lambda: figures.layer_comparison_figure(curves))
        cells = [[f"{row[key]:{form}}" for key, form in _PRINTED.items()] for row in rows]
        bars = [layer_bars(record["layers"]) for record in records]
        lines = [[*row, bar] for row, bar in zip(cells, bars, strict=True)]
        print(text_table([*_PRINTED, "layers, to the largest"], lines))
        for difference in differences:
            print(f"not comparable: {difference}")

    def _record(self, source: str) -> dict[str, Any]:
        if _is_result(source):
            record = read_json(source)
            check_json(f'{source} is no result of "mir-lightning eval --json"', record, _NEEDED)
        else:
            record = evaluate_source(source, self)
            gc.collect()  # the model is in reference cycles, and the next one may not fit beside it
        return record


def _is_result(source: str) -> bool:
    return source.lower().endswith(".json")


def _row(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """A line of the table, by column."""
    vision, text = (fmean(column) for column in zip(*record["effective_rank"], strict=True))
    row = {"model": name, "mir": record["mir"], "robust": record["mir_robust"]}
    row |= {"vision rank": vision, "text rank": text}
    row |= {"vision tokens": record["vision_tokens"], "text tokens": record["text_tokens"]}
    return row | {"layers": len(record["layers"]), "variant": record["variant"]}
