"""``mir-lightning eval``: the number of one model, its layer curve, and files of both."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mir_lightning.callbacks import figures
from mir_lightning.cli.models import load_model, load_processor
from mir_lightning.cli.options import (
    AUTO_BATCH_SIZE,
    PRESET_VARIANT,
    EvaluationOptions,
    ProbeOptions,
    at_least_one,
    flags,
    option,
    output_file,
    whole_number,
)
from mir_lightning.cli.probe import choose_pairs, source_of
from mir_lightning.page import text_table
from mir_lightning.probing.choices.few_shot import FewShotProbe, evaluate_few_shot, pair_items
from mir_lightning.probing.evaluate import MIRResult, evaluate_mir
from mir_lightning.probing.image_gain import ImageGainResult, evaluate_image_gain
from mir_lightning.probing.images import read_image
from mir_lightning.probing.pairs import Pair, PairProbe, check_prompt
from mir_lightning.probing.probe import Probe
from mir_lightning.probing.ranks import fit_into_memory
from mir_lightning.report import literal
from mir_lightning.vlm import find_vlm

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(kw_only=True)
class Eval(EvaluationOptions):
    """Modality Integration Rate of a Hugging Face vision-language model, a PEFT adapter or a recipe checkpoint."""

    model: str = option("folder or hub id of a model or an adapter, or a .ckpt of the recipe", MISSING)
    worst: int | None = option(
        "show the N samples that add most to MIR, and draw them beside --plot; takes --interval's pass",
        type=at_least_one,
        metavar="N",
    )
    gain: bool = option("also what a picture is worth to its text, which must belong to it (captions)", False)
    shots: list[int] | None = option(
        "also the captions, or the answers to --data's questions, that the model writes after K solved examples "
        "of other pairs, with MM1's prompts, such as --shots 0 4 8",
        type=partial(whole_number, least=0),
        nargs="+",
        metavar="K",
    )

    @property
    def worst_plot(self) -> Path | None:
        """Where the worst samples are drawn."""
        return self.plot.with_stem(f"{self.plot.stem}_worst") if self.plot and self.worst else None

    def __post_init__(self) -> None:
        """A ``ValueError`` if there are no samples to show, or too few."""
        self.interval |= self.worst is not None
        super().__post_init__()
        if (self.worst or self.shots) and self.probe:
            asked = "--worst" if self.worst else "--shots"
            raise ValueError(
                f"{asked} shows pictures and texts: give --images and --texts or --data, not --probe."
            )
        if self.shots and max(self.shots) >= self.num:
            raise ValueError(f"--shots {max(self.shots)}: there are {self.num - 1} other pairs to show (--num).")
        if self.worst and self.worst > self.num:
            raise ValueError(f"--worst {self.worst}: the probe has {self.num} pairs (--num).")
        if self.worst_plot:
            output_file(str(self.worst_plot), "worst_plot: ")

    def run(self) -> None:
        """Evaluate, write, print."""
        record, pairs = evaluate_source(self.model, self, self.gain, self.shots)
        columns, rows = figures.layer_table(record)
        title = literal(f"{Path(self.model).name or self.model}: MIR {record['mir']:.3f}")
        self.write(record, [columns, *rows])
        self.draw(lambda: figures.layer_figure(record, title))
        order = torch.tensor(record["influence"] or []).argsort(descending=True, stable=True)[: self.worst or 0]
        worst = [(pairs[place], f"{record['influence'][place]:+.4f}") for place in order.tolist()]
        if self.worst_plot:
            _worst_figure(worst).savefig(self.worst_plot)
        print(summary(record))
        if worst:
            rows = [[_names(pair), added, shorten(" ".join(pair.turns), 72)] for pair, added in worst]
            print(f"\n{text_table(['picture', 'adds to MIR', 'text'], rows)}")


def _names(pair: Pair) -> str:
    return ", ".join(path.name for path in pair.images)


def _worst_figure(worst: Sequence[tuple[Pair, str]]) -> Figure:
    images = [read_image(pair.images[0]) for pair, _ in worst]
    texts = [" ".join(pair.turns) for pair, _ in worst]
    names = [f"{added}  {_names(pair)}".encode(errors="backslashreplace").decode() for pair, added in worst]
    title = "Samples that add most to MIR, with their texts; in grey, how much, and the picture's file"
    return figures.caption_figure(images, texts, names, title=title)


def evaluate_source(
    source: str, options: EvaluationOptions, gain: bool = False, shots: Sequence[int] | None = None
) -> tuple[dict[str, Any], list[Pair]]:
    """The whole result for a model named on the command line, as it is written to ``--json``, and its samples.

    Raises:
        ValueError: for options that a saved probe would ignore, or a model whose weights are not finite.
    """
    pairs: list[Pair] = []  # a saved probe has none
    if options.probe is not None:
        probe, notes = Probe.load(options.probe)
        saved = set(inspect.get_annotations(ProbeOptions)) - ({"text"} - notes.keys())
        if ignored := flags(options.typed & saved):
            raise ValueError(f"--probe {options.probe} is as it was saved, which {ignored} cannot change.")
        if gain and not any("labels" in batch for batch in probe):
            raise ValueError(f"--gain needs labels, which --probe {options.probe} lacks: give pictures and texts.")
        text: Any = notes.get("text", options.text)
        variant = PRESET_VARIANT if "preset" in notes and "variant" not in options.typed else options.variant
        options = replace(options, text=text, variant=variant)
        origin, prompt = notes.get("source", probe.fingerprint), "as saved"
        found = _evaluate(load_model(source, options), probe, options, gain)
    else:
        pairs = choose_pairs(options)
        origin, size = source_of(pairs), options.batch_size or AUTO_BATCH_SIZE
        processor = load_processor(source, options.processor)
        check_prompt(options.prompt, processor)
        model = load_model(source, options)

        def make(size: int) -> PairProbe:
            return PairProbe(processor, find_vlm(model).config, pairs, size, options.prompt, options.text, gain)

        prompt, most = make(size).prompt or "chat template", min(size, len(pairs))
        found = fit_into_memory(  # batches that the engine cannot cut
            lambda size: _evaluate(model, make(size), options, gain),
            most,
            lambda size: size // 2 or None if options.batch_size is None else None,
        )
        if shots:
            items = pair_items(pairs)
            answers = evaluate_few_shot(
                model,
                FewShotProbe(items, items, processor, shots, options.seed or 0),
                batch_size=size,
                progress=None if options.no_progress else "answers",
            )
            found["few_shot"] = [
                {"shots": count, "task": task or "all", **score._asdict()}
                for count, by_task in answers.scores.items()
                for task, score in by_task.items()
            ]
    return {"model": source, "source": origin, "prompt": prompt, **found}, pairs


def _evaluate(model: nn.Module, probe: Probe, options: EvaluationOptions, gain: bool) -> dict[str, Any]:
    """Fields of the result, and those of the image gain below ``image_gain``."""
    progress = None if options.no_progress else "probe"
    try:
        names = ("variant", "text", "layers", "image_token_id", "interval", "rank_order", "products")
        chosen = {name: getattr(options, name) for name in names}
        result = evaluate_mir(model, probe, **chosen, check=not options.no_check, progress=progress)
        token, title = options.image_token_id, progress and f"{progress}, gain"
        worth = evaluate_image_gain(model, probe, image_token_id=token, progress=title) if gain else None
        return {**_plain(result), "image_gain": worth and _plain(worth)}
    except ValueError as error:
        for name, weight in model.named_parameters():
            if weight.is_floating_point() and not weight.is_meta and not weight.float().isfinite().all():
                raise ValueError(f"the model has diverged: its weight {name} is not finite.") from error
        raise


def _plain(result: MIRResult | ImageGainResult) -> dict[str, Any]:
    """Fields as JSON has them: it has no NaN, which is for what is unknown."""
    found = {k: v for k, v in vars(result).items() if k not in ("sample", "sources")}
    text = json.dumps(found, default=Tensor.tolist)
    return json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))


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
        "outliers": f"{sum(out[0]):.0f} vision, {sum(out[1]):.0f} text, over {len(layers)} layers",
        "massive": f"{shares[0]:.1%} of vision, {shares[1]:.1%} of text tokens",
        "rank": f"{fmean(rank[0]):.1f} vision, {fmean(rank[1]):.1f} text "
        f"(order {record['rank_order']}, mean over layers)",
        "layers": f"{layer_bars(layers)}  {min(layers):.3g} to {max(layers):.3g}",
        "seconds": f"{record['seconds']:.1f}",
    }
    if gains := record["image_gain"]:
        other, blank = (
            f"{gains[f'gain{of}']:.4f}{plus_minus(gains[f'standard_error{of}'])}" for of in ("", "_blank")
        )
        pictures = f"nats a token with another picture, {blank} with a blank one"
        lines["gain"] = f"{other} {pictures} (95 %; higher is better)"
    for row in record.get("few_shot", []):
        told = f"exact match {row['exact_match']:.3f}, F1 {row['f1']:.3f} ({row['task']})"
        lines |= {f"{row['shots']} shots": told} if row["task"] != "all" else {}
    sure = plus_minus(record["standard_error"])
    first = f"MIR {record['mir']:.4f}{sure} ({'95 %; ' * bool(sure)}{record['variant']}; lower is better aligned)"
    return "\n".join([first, *(f"  {name:<8}  {line}" for name, line in lines.items())])


def plus_minus(standard_error: float | None) -> str:
    """The 95 % interval, as it is printed behind a number; nothing where it is unknown."""
    return "" if standard_error is None else f" {shown('±', '+-')} {1.96 * standard_error:.4f}"


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
