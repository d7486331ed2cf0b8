"""``mir-lightning probe``: the pairs that the command line's options choose, and a file of them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

from transformers import AutoConfig

from mir_lightning.cli.models import base_of_adapter, load_processor
from mir_lightning.cli.options import AUTO_BATCH_SIZE, ProbeOptions, flags, option, output_file
from mir_lightning.llava.data.prompts import IMAGE
from mir_lightning.llava.data.records import image_path, read_records
from mir_lightning.llava.model.saving import naming
from mir_lightning.probing.pairs import Pair, PairProbe, check_characters, choose, read_pairs, readable_pairs


@dataclass(kw_only=True)
class Probe(ProbeOptions):
    """Process images and texts for a model, and save them as a safetensors file for eval --probe."""

    model: str = option("folder or hub id of the model; only its config and processor are read", MISSING)
    output: Path = option("file to write, .safetensors", short=["-o"], type=output_file, required=True)

    def run(self) -> None:
        """Choose, process, save."""
        pairs = choose_pairs(self)
        processor = load_processor(self.model, self.processor)
        place = base_of_adapter(self.model) or self.model
        with naming(place):
            config = AutoConfig.from_pretrained(place)
        size = self.batch_size or AUTO_BATCH_SIZE
        probe = PairProbe(processor, config, pairs, size, self.prompt, self.text)
        preset = {} if self.preset is None else {"preset": self.preset}
        probe.save(self.output, source=source_of(pairs), model=self.model, text=self.text, **preset)
        print(f"{self.output}: {len(pairs)} pairs in {len(probe)} batches, fingerprint {probe.fingerprint}")


def choose_pairs(options: ProbeOptions) -> list[Pair]:
    """The readable pairs; what cannot be read is named.

    Raises:
        ValueError: if the options name no source, two, or one with fewer than ``--num`` pairs, or more than
            ``--max-unreadable`` of the pairs are unreadable.
    """
    sources = {name for name in ("images", "texts", "data", "image_folder") if getattr(options, name) is not None}
    listed = {"image_folder"} if options.images and options.images.is_file() else set()
    if beside := sources - ({"data", "image_folder"} if options.data else {"images", "texts"} | listed):
        raise ValueError(
            f"{flags(beside)}: --images goes with --texts; --image-folder with --data, or with a list as --images."
        )
    if options.data is not None:
        pairs = _pairs_of_records(options.data, options)
    elif options.images is None or options.texts is None:
        raise ValueError("a probe needs --images and --texts, or --data, or --probe.")
    else:
        pairs = read_pairs(options.images, options.texts, options.num, options.seed, options.image_folder)
    kept, unreadable = readable_pairs(pairs)
    for reason in unreadable:
        print(f"mir-lightning: left out: {reason}", file=sys.stderr)
    if len(unreadable) > options.max_unreadable * len(pairs):
        raise ValueError(
            f"{len(unreadable)} of {len(pairs)} pairs have images that cannot be read, more than "
            f"--max-unreadable {options.max_unreadable:g} allows; the first: {unreadable[0]}"
        )
    return kept


def _pairs_of_records(data: Path, options: ProbeOptions) -> list[Pair]:
    found = [record for record in read_records(data) if record.images]
    if len(found) < options.num:
        raise ValueError(f"data: {data} holds {len(found)} records with images, {options.num} are needed (--num).")
    folder, pairs = options.image_folder or data.parent, []
    for record in choose(found, options.num, options.seed, "data"):
        check_characters(record.place, "".join(record.turns))
        images = tuple(image_path(folder, image) for image in record.images)
        turns = tuple(turn.replace(IMAGE, "").strip() for turn in record.turns)  # the pictures come before them
        pairs.append(Pair(images, turns))
    return pairs


def source_of(pairs: Sequence[Pair]) -> str:
    """Hex digest of the images and texts themselves: the same for every model and batch size."""
    digest = hashlib.sha256()
    for pair in pairs:
        for content in (*(path.read_bytes() for path in pair.images), *(turn.encode() for turn in pair.turns)):
            digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
