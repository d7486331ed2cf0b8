"""``mir-lightning compare``: several results or models on one probe, side by side."""

from __future__ import annotations

import argparse
import csv
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mir_lightning.callbacks import figures
from mir_lightning.cli.evaluate import add_metric_options, evaluate_source, layer_bars
from mir_lightning.cli.models import add_model_options
from mir_lightning.cli.probe import Parsers, add_probe_options

_MUST_AGREE = {"source": "probe", "variant": "variant", "text": "text positions"}
_COLUMNS = (
    "model",
    "mir",
    "robust",
    "vision rank",
    "text rank",
    "vision tokens",
    "text tokens",
    "layers",
    "variant",
)


def add_parser(commands: Parsers, parents: list[argparse.ArgumentParser]) -> None:
    """The ``compare`` command."""
    parser = commands.add_parser(
        "compare",
        parents=parents,
        help="several results or models on one probe",
        description="A table of results sorted by MIR, and their layer curves in one picture.",
    )
    parser.add_argument(
        "sources", nargs="+", metavar="RESULT_OR_MODEL", help='.json files of "eval --json", or models to evaluate'
    )
    parser.add_argument(
        "--allow-different", action="store_true", help="compare even results of different probes or variants"
    )
    add_model_options(parser)
    add_probe_options(parser)
    add_metric_options(parser)
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--csv", type=Path, help="write the table to this file")
    parser.add_argument("--plot", type=Path, help="draw the layer curves into this file (.png, .pdf, .svg)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    records = sorted((_record(source, options) for source in options.sources), key=lambda record: record["mir"])
    differences = _differences(records)
    if differences and not options.allow_different:
        raise ValueError(
            f"these results are not comparable: {'; '.join(differences)}. --allow-different shows them anyway."
        )
    names = _names(records)
    print(_table(names, records))
    for difference in differences:
        print(f"not comparable: {difference}")
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([_COLUMNS, *(_row(n, r) for n, r in zip(names, records, strict=True))])
    if options.plot:
        figure = figures.layer_comparison_figure(
            {f"{name} (MIR {r['mir']:.3f})": r["layers"] for name, r in zip(names, records, strict=True)}
        )
        figure.savefig(options.plot)


def _record(source: str, options: argparse.Namespace) -> dict[str, Any]:
    if not source.endswith(".json"):
        record = evaluate_source(source, options)
        gc.collect()  # the model is in reference cycles, and the next one may not fit beside it
        return record
    try:
        record = json.loads(Path(source).read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}.") from error
    if not isinstance(record, dict) or not {"mir", "mir_robust", "layers", "source", "variant"} <= record.keys():
        raise ValueError(f'{source} is no result of "mir-lightning eval --json".')
    return record


def _differences(records: Sequence[dict[str, Any]]) -> list[str]:
    """What differs that should not, each with its values."""
    found = []
    for key, name in _MUST_AGREE.items():
        values = {str(record[key])[:12]: record["model"] for record in records}
        if len(values) > 1:
            found.append(f"{name} " + ", ".join(f"{value} ({model})" for value, model in values.items()))
    return found


def _names(records: Sequence[dict[str, Any]]) -> list[str]:
    """Last part of each model's path, or all of it where that is not enough to tell them apart."""
    short = [Path(record["model"]).name for record in records]
    return short if len(set(short)) == len(short) else [record["model"] for record in records]


def _row(name: str, record: dict[str, Any]) -> list[Any]:
    layers = len(record["layers"])
    ranks = [sum(column) / layers for column in zip(*record["effective_rank"], strict=True)]
    return [
        name,
        record["mir"],
        record["mir_robust"],
        *ranks,
        record["vision_tokens"],
        record["text_tokens"],
        layers,
        record["variant"],
    ]


def _table(names: Sequence[str], records: Sequence[dict[str, Any]]) -> str:
    width = max(len("model"), *(len(name) for name in names))
    lines = [
        f"{'model':<{width}}  {'MIR':>7}  {'robust':>7}  {'vision rank':>11}  {'text':>6}  layers, to the largest"
    ]
    for name, record in zip(names, records, strict=True):
        _, mir, robust, vision_rank, text_rank, *_ = _row(name, record)
        lines.append(
            f"{name:<{width}}  {mir:>7.4f}  {robust:>7.4f}  {vision_rank:>11.1f}  {text_rank:>6.1f}  "
            f"{layer_bars(record['layers'])}"
        )
    return "\n".join(lines)
