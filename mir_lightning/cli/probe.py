"""``mir-lightning probe``: what to show a model, from the command line's options, and how to save it."""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from transformers import AutoConfig, PreTrainedConfig

from mir_lightning.cli.models import base_of_adapter, load_processor
from mir_lightning.llava.data.prompts import IMAGE
from mir_lightning.llava.data.records import image_path, read_records
from mir_lightning.probing.pairs import Pair, PairProbe, read_pairs, readable_pairs
from mir_lightning.probing.probe import Probe
from mir_lightning.vlm import TextPositions

Parsers = Any  # argparse names no type for what add_subparsers returns
_AUTO_BATCH_SIZE = 8


def add_parser(commands: Parsers, parents: list[argparse.ArgumentParser]) -> None:
    """The ``probe`` command."""
    parser = commands.add_parser(
        "probe",
        parents=parents,
        help="save a probe, processed for a model, to evaluate again and again",
        description="Process images and texts for a model and save them as a safetensors file for eval --probe.",
    )
    parser.add_argument("model", help="folder or hub id of the model; only its config and processor are read")
    parser.add_argument("--processor", help="folder or hub id of the processor, if it is not beside the model")
    parser.add_argument("--output", "-o", type=Path, required=True, help="file to write, .safetensors")
    add_probe_options(parser, saved=False)
    parser.set_defaults(run=_run)


def add_probe_options(parser: argparse.ArgumentParser, saved: bool = True) -> None:
    """Where images and texts come from."""
    group = parser.add_argument_group("probe", "image i, then text i: --images and --texts, or --data")
    group.add_argument("--images", type=Path, help="folder of pictures")
    group.add_argument(
        "--texts", type=Path, help="folder of .txt, .story (up to @highlight) or .jsonl files, or one .jsonl file"
    )
    group.add_argument("--data", type=Path, help="LLaVA-format .json or .jsonl file instead")
    group.add_argument("--image-folder", type=Path, help="folder that the paths in --data start from")
    if saved:
        group.add_argument("--probe", type=Path, help='file that "mir-lightning probe" wrote instead')
    group.add_argument("--num", type=at_least_one, default=100, help="pairs (default: %(default)s)")
    group.add_argument("--seed", type=int, help="draw the pairs at random; without it, the first by name")
    group.add_argument(
        "--batch-size", type=_batch_size, default=None, metavar="N|auto", help='pairs a batch (default: "auto")'
    )
    group.add_argument("--prompt", help="format with {image} and {text}, instead of the chat template")
    group.add_argument(
        "--text",
        choices=get_args(TextPositions),
        default="after_vision",
        help="which positions count as text (default: %(default)s)",
    )
    group.add_argument(
        "--max-unreadable",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of pairs that may be left out for images that cannot be read (default: %(default)s)",
    )


def at_least_one(value: str) -> int:
    """An argument that counts something."""
    if not value.isdigit() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {value!r}")
    return int(value)


def _batch_size(value: str) -> int | None:
    return None if value == "auto" else at_least_one(value)


def choose_pairs(options: argparse.Namespace) -> list[Pair]:
    """The readable pairs; what cannot be read is named.

    Raises:
        ValueError: if the options name no source, or more than ``--max-unreadable`` of the pairs are unreadable.
    """
    pairs = _pairs(options)
    kept, unreadable = readable_pairs(pairs)
    for reason in unreadable:
        print(f"mir-lightning: left out: {reason}", file=sys.stderr)
    if len(unreadable) > options.max_unreadable * len(pairs):
        raise ValueError(
            f"{len(unreadable)} of {len(pairs)} pairs have images that cannot be read, more than "
            f"--max-unreadable {options.max_unreadable:g} allows; the first: {unreadable[0]}"
        )
    return kept


def _pairs(options: argparse.Namespace) -> list[Pair]:
    if options.data is not None:
        return _pairs_of_records(options.data, options.image_folder or options.data.parent, options)
    if options.images is None or options.texts is None:
        raise ValueError("a probe needs --images and --texts, or --data, or --probe.")
    return read_pairs(options.images, options.texts, options.num, options.seed)


def _pairs_of_records(data: Path, folder: Path, options: argparse.Namespace) -> list[Pair]:
    with_images = [record for record in read_records(data) if record.images]
    if len(with_images) < options.num:
        raise ValueError(f"data: {data} holds {len(with_images)} records with images, {options.num} are needed.")
    if options.seed is not None:
        with_images = random.Random(options.seed).sample(with_images, options.num)
    return [
        Pair(
            tuple(image_path(folder, image) for image in record.images), tuple(map(_without_places, record.turns))
        )
        for record in with_images[: options.num]
    ]


def _without_places(turn: str) -> str:
    """A turn whose pictures come before it."""
    return turn.replace(IMAGE, "").strip()


def make_probe(
    pairs: Sequence[Pair], processor: Any, config: PreTrainedConfig, options: argparse.Namespace
) -> PairProbe:
    """The pairs as a model's processor prepares them."""
    size = options.batch_size or min(_AUTO_BATCH_SIZE, len(pairs))
    return PairProbe(processor, config, pairs, size, options.prompt, options.text)


def source_of(pairs: Sequence[Pair]) -> str:
    """Hex digest of the images and texts themselves: the same for every model and batch size."""
    digest = hashlib.sha256()
    for pair in pairs:
        for path in pair.images:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        for turn in pair.turns:
            digest.update(hashlib.sha256(turn.encode()).digest())
    return digest.hexdigest()


def load_probe(path: Path) -> tuple[Probe, str]:
    """A saved probe and its source."""
    probe, notes = Probe.load(path)
    return probe, notes.get("source", probe.fingerprint)


def _run(options: argparse.Namespace) -> None:
    pairs = choose_pairs(options)
    config = AutoConfig.from_pretrained(base_of_adapter(options.model) or options.model)
    probe = make_probe(pairs, load_processor(options.model, options), config, options)
    probe.save(options.output, source=source_of(pairs), model=options.model, text=options.text)
    print(f"{options.output}: {len(pairs)} pairs in {len(probe)} batches, fingerprint {probe.fingerprint}")
