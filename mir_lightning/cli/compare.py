"""``mir-lightning compare``: several results or models on one probe, side by side."""

from __future__ import annotations

import gc
import inspect
from dataclasses import MISSING, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mir_lightning.callbacks import figures
from mir_lightning.cli.evaluate import evaluate_source, layer_bars, plus_minus, shown
from mir_lightning.cli.options import EvaluationOptions, ModelOptions, ProbeOptions, flags, option
from mir_lightning.files import check_json, read_json
from mir_lightning.functional.influence import standard_error
from mir_lightning.page import text_table
from mir_lightning.report import literal

_MUST_AGREE = {"source": "probe", "variant": "variant", "text": "text positions"}
_OWNERS = (ProbeOptions, ModelOptions, EvaluationOptions)
_OF_MODELS = {name for owner in _OWNERS for name in inspect.get_annotations(owner)} - {
    *("json", "csv", "plot", "no_progress", "interval")
}
_NEEDED = {
    **dict.fromkeys(("model", "source", "variant", "text"), str),
    **dict.fromkeys(("mir", "mir_robust"), float),
    **dict.fromkeys(("vision_tokens", "text_tokens"), int),
    "layers": [float],
    "effective_rank": [[float, float]],
}
# Older results, or those without --interval, have none of these.
_NEWER = {"standard_error": float, "influence": [float], "mir_equal_norm": float, "rank_order": int}
_PRINTED = {"model": "", "mir": ".4f", "±": ".4f", "robust": ".4f", "vision rank": ".1f", "text rank": ".1f"}


@dataclass(kw_only=True)
class Compare(EvaluationOptions):
    """Several results or models on one probe: a table sorted by MIR, and their layer curves in one picture."""

    sources: list[str] = option(
        '.json files of "eval --json", or models to evaluate', MISSING, metavar="RESULT_OR_MODEL", nargs="+"
    )
    allow_different: bool = option("compare even results of different probes or variants", False)

    def run(self) -> None:
        """Read or evaluate, write, print."""
        if all(map(_is_result, self.sources)) and (ignored := flags(self.typed & _OF_MODELS)):
            raise ValueError(f"{ignored} cannot change results: there is no model to evaluate among the sources.")
        files_first = sorted(self.sources, key=_is_result, reverse=True)  # what is wrong in them is told at once
        records = sorted(map(self._record, files_first), key=lambda record: record["mir"])
        differences = []
        for key, name in _MUST_AGREE.items():
            values = {str(record[key]): record["model"] for record in records}
            if len(values) > 1:
                given = ", ".join(f"{value[:12]} ({model})" for value, model in values.items())
                differences.append(f"{name} {given}")
        if differences and not self.allow_different:
            raise ValueError(f"not comparable: {'; '.join(differences)}. --allow-different shows them anyway.")
        names = [Path(record["model"]).name or record["model"] for record in records]
        if len(set(names)) < len(names):
            names = [record["model"] for record in records]
        named = list(zip(names, records, strict=True))
        rows = [_row(name, record) for name, record in named]
        if all(row["±"] is None for row in rows):
            rows = [{key: value for key, value in row.items() if key != "±"} for row in rows]
        curves = {literal(f"{name} (MIR {record['mir']:.3f})"): record["layers"] for name, record in named}
        table = [list(rows[0]), *(list(row.values()) for row in rows)]
        self.write(records, table)
        self.draw(lambda: figures.layer_comparison_figure(curves))
        printed = {key: form for key, form in _PRINTED.items() if key in rows[0]}
        lines = []
        for row, record in zip(rows, records, strict=True):
            cells = ("" if row[key] is None else f"{row[key]:{form}}" for key, form in printed.items())
            lines.append([*cells, layer_bars(record["layers"])])
        columns = [shown(key, "+-") if key == "±" else key for key in printed]
        print(text_table([*columns, "layers, to the largest"], lines))
        for difference in differences:
            print(f"not comparable: {difference}")
        if len({record.get("rank_order", 1) for record in records}) > 1:
            print("the ranks are of different orders (--rank-order), and not comparable")
        if self.interval or all(record.get("influence") for record in records):
            for name, record in named[1:]:
                print(f"{name} - {names[0]}: {_paired(record, records[0])}")

    def _record(self, source: str) -> dict[str, Any]:
        if _is_result(source):
            record = read_json(source)
            place = f'{source} is no result of "mir-lightning eval --json"'
            check_json(place, record, _NEEDED)
            newer = {**_NEWER, "norm_ratio": [float] * len(record["layers"])}
            known = {key: kind for key, kind in newer.items() if record.get(key) is not None}
            check_json(place, record, known)
            if self.interval and "influence" not in known:
                remedy = '"mir-lightning eval --interval" does'
                raise ValueError(f"--interval: {source} holds no influences; {remedy}.")
        else:
            record, _ = evaluate_source(source, self)
            gc.collect()  # the model is in reference cycles, and the next one may not fit beside it
        return record


def _is_result(source: str) -> bool:
    return source.lower().endswith(".json")


def _row(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """A line of the table, by column."""
    vision, text = (fmean(column) for column in zip(*record["effective_rank"], strict=True))
    error = record.get("standard_error")
    row = {"model": name, "mir": record["mir"], "±": None if error is None else 1.96 * error}
    row |= {"robust": record["mir_robust"], "vision rank": vision, "text rank": text}
    row |= {"vision tokens": record["vision_tokens"], "text tokens": record["text_tokens"]}
    return row | {"layers": len(record["layers"]), "variant": record["variant"]}


def _paired(record: dict[str, Any], best: dict[str, Any]) -> str:
    """How far the model is from the best one, each sample beside itself."""
    if different := [name for key, name in _MUST_AGREE.items() if record[key] != best[key]]:
        return f"not paired, as they differ in {' and '.join(different)}"
    of_record, of_best = (torch.tensor(each["influence"], dtype=torch.float64) for each in (record, best))
    if len(of_record) != len(of_best) or len(of_best) < 2:
        return f"not paired, as their influences are of {len(of_record)} and {len(of_best)} samples"
    difference, error = record["mir"] - best["mir"], standard_error(of_record - of_best).item()
    noise = ": smaller than its noise" if abs(difference) <= 1.96 * error else ""
    return f"{difference:+.4f}{plus_minus(error)} (95 %, paired over {len(of_best)} samples){noise}"
