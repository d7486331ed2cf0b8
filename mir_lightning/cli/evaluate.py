"""``mir-lightning eval``: the number of one model, its layer curve, and files of both."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mir_lightning.callbacks import figures
from mir_lightning.cli.models import add_model_options, load_model, load_processor
from mir_lightning.cli.probe import Parsers, add_probe_options, choose_pairs, load_probe, make_probe, source_of
from mir_lightning.functional.mir import Variant
from mir_lightning.probing.evaluate import MIRResult, evaluate_mir
from mir_lightning.probing.pairs import Pair
from mir_lightning.probing.probe import Probe
from mir_lightning.vlm import find_vlm

_BARS = "▁▂▃▄▅▆▇█"


def add_parser(commands: Parsers, parents: list[argparse.ArgumentParser]) -> None:
    """The ``eval`` command."""
    parser = commands.add_parser(
        "eval",
        parents=parents,
        help="Modality Integration Rate of a model",
        description="Modality Integration Rate of a Hugging Face vision-language model, a PEFT adapter, or a "
        "checkpoint of the recipe, on images and texts.",
    )
    parser.add_argument("model", help="folder or hub id of a model or an adapter, or a .ckpt of the recipe")
    add_model_options(parser)
    add_probe_options(parser)
    add_metric_options(parser)
    parser.add_argument("--json", type=Path, help="write the whole result to this file")
    parser.add_argument("--csv", type=Path, help="write the table of layers to this file")
    parser.add_argument("--plot", type=Path, help="draw the layer curve into this file (.png, .pdf, .svg)")
    parser.set_defaults(run=_run)


def add_metric_options(parser: argparse.ArgumentParser) -> None:
    """How to measure."""
    group = parser.add_argument_group("metric")
    group.add_argument("--variant", choices=get_args(Variant), default="paper", help="(default: %(default)s)")
    group.add_argument(
        "--layers", help="dotted path of the decoder layers inside the model, if not found by itself"
    )
    group.add_argument("--image-token-id", type=int, help="placeholder of vision tokens, if the config is wrong")
    group.add_argument("--no-check", action="store_true", help="skip the self-check of the vision mask")
    group.add_argument("--no-progress", action="store_true", help="show no progress bar")


def evaluate_source(source: str, options: argparse.Namespace) -> dict[str, Any]:
    """The whole result for a model named on the command line, as it is written to ``--json``."""
    if options.probe is not None:
        probe, origin = load_probe(options.probe)
        result = _evaluate(load_model(source, options), probe, options)
        prompt = "as saved"
    else:
        pairs = choose_pairs(options)
        origin = source_of(pairs)
        processor, model = load_processor(source, options), load_model(source, options)
        result, prompt = _evaluate_in_memory(model, processor, pairs, options)
    plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in asdict(result).items() if k != "sample"}
    return {"model": source, "source": origin, "prompt": prompt, **plain}


def _evaluate_in_memory(
    model: nn.Module, processor: Any, pairs: Sequence[Pair], options: argparse.Namespace
) -> tuple[MIRResult, str]:
    """Result and prompt; with smaller batches where automatic ones do not fit and the engine cannot cut them."""
    settings = argparse.Namespace(**vars(options))
    while True:
        probe = make_probe(pairs, processor, find_vlm(model).config, settings)
        try:
            return _evaluate(model, probe, options), probe.prompt or "chat template"
        except torch.OutOfMemoryError:
            size = len(probe.pairs[0])
            if options.batch_size is not None or size == 1:
                raise
            settings.batch_size = size // 2


def _evaluate(model: nn.Module, probe: Probe, options: argparse.Namespace) -> MIRResult:
    return evaluate_mir(
        model,
        probe,
        options.variant,
        options.text,
        layers=options.layers,
        image_token_id=options.image_token_id,
        check=not options.no_check,
        progress=None if options.no_progress else "probe",
    )


def _run(options: argparse.Namespace) -> None:
    record = evaluate_source(options.model, options)
    print(summary(record))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1))
    columns, rows = figures.layer_table(record)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    if options.plot:
        figures.layer_figure(record, f"{Path(options.model).name}: MIR {record['mir']:.3f}").savefig(options.plot)


def summary(record: dict[str, Any]) -> str:
    """The number, what it was measured on, and the curve by layer in one line."""
    outliers, massive = (
        [sum(column) for column in zip(*record[key], strict=True)] for key in ("outliers", "massive")
    )
    tokens = (record["vision_tokens"], record["text_tokens"])
    shares = [count / (total * len(record["layers"])) for count, total in zip(massive, tokens, strict=True)]
    ranks = [sum(column) / len(record["layers"]) for column in zip(*record["effective_rank"], strict=True)]
    lines = [
        f"MIR {record['mir']:.4f} ({record['variant']}; lower is better aligned)",
        f"  robust    {record['mir_robust']:.4f}",
        f"  prompt    {json.dumps(record['prompt'])}",
        f"  tokens    {tokens[0]} vision, {tokens[1]} text ({record['text']})",
        f"  outliers  {outliers[0]} vision, {outliers[1]} text, over {len(record['layers'])} layers",
        f"  massive   {shares[0]:.1%} of vision, {shares[1]:.1%} of text tokens",
        f"  rank      {ranks[0]:.1f} vision, {ranks[1]:.1f} text (mean over layers)",
        f"  layers    {layer_bars(record['layers'])}  {min(record['layers']):.3g} to {max(record['layers']):.3g}",
        f"  seconds   {record['seconds']:.1f}",
    ]
    return "\n".join(lines)


def layer_bars(layers: list[float]) -> str:
    """The layers' distances as a row of bars, the longest one the largest."""
    top = max(*layers, 1e-300)
    return "".join(_BARS[min(len(_BARS) - 1, int(max(value, 0) / top * len(_BARS)))] for value in layers)
