"""``mir-lightning eval``: the number of one model, its layer curve, and files of both."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from mir_lightning.callbacks import figures
from mir_lightning.cli.models import load_model, load_processor
from mir_lightning.cli.options import AUTO_BATCH_SIZE, EvaluationOptions, ProbeOptions, flags, option
from mir_lightning.cli.probe import choose_pairs, source_of
from mir_lightning.probing.evaluate import MIRResult, evaluate_mir
from mir_lightning.probing.pairs import PairProbe, check_prompt
from mir_lightning.probing.probe import Probe
from mir_lightning.report import literal
from mir_lightning.vlm import find_vlm


@dataclass(kw_only=True)
class Eval(EvaluationOptions):
    """Modality Integration Rate of a Hugging Face vision-language model, a PEFT adapter or a recipe checkpoint."""

    model: str = option("folder or hub id of a model or an adapter, or a .ckpt of the recipe", MISSING)

    def run(self) -> None:
        """Evaluate, write, print."""
        record = evaluate_source(self.model, self)
        columns, rows = figures.layer_table(record)
        title = literal(f"{Path(self.model).name or self.model}: MIR {record['mir']:.3f}")
        self.write(record, [columns, *rows], lambda: figures.layer_figure(record, title))
        print(summary(record))


def evaluate_source(source: str, options: EvaluationOptions) -> dict[str, Any]:
    """The whole result for a model named on the command line, as it is written to ``--json``.

    Raises:
        ValueError: for options that a saved probe would ignore, or a model whose weights are not finite.
    """
    if options.probe is not None:
        probe, notes = Probe.load(options.probe)
        saved = set(inspect.get_annotations(ProbeOptions)) - ({"text"} - notes.keys())
        if ignored := flags(options.given & saved):
            raise ValueError(f"--probe {options.probe} is as it was saved, which {ignored} cannot change.")
        text: Any = notes.get("text", options.text)
        options = replace(options, text=text)
        origin, prompt = notes.get("source", probe.fingerprint), "as saved"
        result = _evaluate(load_model(source, options), probe, options)
    else:
        pairs = choose_pairs(options)
        origin, size = source_of(pairs), options.batch_size or AUTO_BATCH_SIZE
        processor = load_processor(source, options.processor)
        check_prompt(options.prompt, processor)
        model = load_model(source, options)
        while True:
            made = PairProbe(processor, find_vlm(model).config, pairs, size, options.prompt, options.text)
            prompt = made.prompt or "chat template"
            try:
                result = _evaluate(model, made, options)
                break
            except torch.OutOfMemoryError:  # of batches that the engine cannot cut
                size = len(made.pairs[0]) // 2
                if options.batch_size is not None or size == 0:
                    raise
    plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in asdict(result).items() if k != "sample"}
    return {"model": source, "source": origin, "prompt": prompt, **plain}


def _evaluate(model: nn.Module, probe: Probe, options: EvaluationOptions) -> MIRResult:
    try:
        return evaluate_mir(
            model,
            probe,
            options.variant,
            options.text,
            layers=options.layers,
            image_token_id=options.image_token_id,
            check=not options.no_check,
            progress=None if options.no_progress else "probe",
            interval=options.interval,
            rank_order=options.rank_order,
        )
    except ValueError as error:
        for name, weight in model.named_parameters():
            if weight.is_floating_point() and not weight.is_meta and not weight.float().isfinite().all():
                raise ValueError(f"the model has diverged: its weight {name} is not finite.") from error
        raise


def summary(record: Mapping[str, Any]) -> str:
    """The number, what it was measured on, and the curve by layer in one line."""
    layers, tokens = record["layers"], (record["vision_tokens"], record["text_tokens"])
    out, massive, rank = (list(zip(*record[k], strict=True)) for k in ("outliers", "massive", "effective_rank"))
    shares = [fmean(counts) / total for counts, total in zip(massive, tokens, strict=True)]
    lines = {
        "robust": f"{record['mir_robust']:.4f}",
        "prompt": json.dumps(record["prompt"]),
        "norms": f"vision {fmean(record['norm_ratio']):.3g} times text (mean over layers); at equal norms "
        f"MIR {record['mir_equal_norm']:.4f}",
        "tokens": f"{tokens[0]} vision, {tokens[1]} text ({record['text']})",
        "outliers": f"{sum(out[0])} vision, {sum(out[1])} text, over {len(layers)} layers",
        "massive": f"{shares[0]:.1%} of vision, {shares[1]:.1%} of text tokens",
        "rank": f"{fmean(rank[0]):.1f} vision, {fmean(rank[1]):.1f} text "
        f"(order {record['rank_order']}, mean over layers)",
        "layers": f"{layer_bars(layers)}  {min(layers):.3g} to {max(layers):.3g}",
        "seconds": f"{record['seconds']:.1f}",
    }
    error, sure, level = record["standard_error"], "", ""
    if error is not None:
        sure, level = f" {plus_minus(error)}", "95 %; "
    first = f"MIR {record['mir']:.4f}{sure} ({level}{record['variant']}; lower is better aligned)"
    return "\n".join([first, *(f"  {name:<8}  {line}" for name, line in lines.items())])


def plus_minus(standard_error: float) -> str:
    """The 95 % interval, as it is printed behind a number."""
    return f"{shown('±', '+-')} {1.96 * standard_error:.4f}"


def layer_bars(layers: Sequence[float]) -> str:
    """The layers' distances as a row of bars, the longest one the largest; digits where bars cannot be printed."""
    bars, top = shown("▁▂▃▄▅▆▇█", "12345678"), max(*layers, 1e-300)
    return "".join(bars[min(len(bars) - 1, int(max(value, 0) / top * len(bars)))] for value in layers)


def shown(text: str, plain: str) -> str:
    """The text, or another one where the terminal lacks its characters."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return plain
    return text
