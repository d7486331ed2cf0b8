"""Samples streamed from shards in LitData's format, from a folder or an object store, resumable in mid-epoch."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection

from mir_lightning.llava.data.prompts import IMAGE
from mir_lightning.llava.data.records import read_record
from mir_lightning.llava.data.source import Collate, Sample, Source, training_size
from mir_lightning.probing.images import UnreadableImageError, read_image

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")  # it would ask the package index


class ShardsLoader:
    """LitData's loader: it knows where in the shards each worker is, and goes on from there.

    LitData begins the next epoch only where the last was read to its end; a Trainer stops at the last batch.
    """

    def __init__(self, training: Any, collate: Collate, **options: Any) -> None:
        from litdata import StreamingDataLoader

        generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
        collate = partial(with_replacements, collate)
        self.loader = StreamingDataLoader(training, collate_fn=collate, generator=generator, **options)
        self._loaded = False

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """An epoch, or the rest of the one that was loaded."""
        self.loader.restore &= self._loaded
        self._loaded = False
        yield from self.loader

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.loader.load_state_dict(state)
        self._loaded = True

    def state_dict(self) -> dict[str, Any]:
        """Where each worker is, in plain numbers, loadable with ``weights_only``."""
        return apply_to_collection(self.loader.state_dict(), np.generic, np.generic.item)


def with_replacements(collate: Collate, samples: Sequence[Sample]) -> Any:
    """In place of an unreadable sample the next one of the batch, so that the loader's count stays right."""
    readable = [index for index, sample in enumerate(samples) if not sample.unreadable]
    if not readable:
        raise UnreadableImageError(f"a whole batch cannot be read: {'; '.join(s.unreadable[0] for s in samples)}")
    instead = [next((i for i in readable if i >= index), readable[0]) for index in range(len(samples))]
    return collate([replace(samples[i], unreadable=s.unreadable) for i, s in zip(instead, samples, strict=True)])


@dataclass(frozen=True)
class Shards(Source):
    """LitData shards of LLaVA-format records whose ``image`` is the bytes of a picture, empty for text alone.

    Whole shards are drawn at random, the held-out samples first. Over several ranks each gets whole shards, and an
    epoch ends for all where the rank with the fewest samples is through: the rest is left out of that epoch.
    Unreadable samples are left out of the held-out ones, with a warning. The same number of workers has to go on
    after an interruption.

    Args:
        folder: of the shards, or ``s3://``, ``gs://`` or what else LitData reads.

    Raises:
        ImportError: without the ``litdata`` package.
        ValueError: when samples are drawn, if there are no shards, or too few samples in them.
    """

    folder: str

    def split(self, held_out: int, scale: int | None, seed: int) -> tuple[Any, list[Sample]]:
        """Whole shards, in a seeded order."""
        try:
            from litdata import StreamingDataset, train_test_split
        except ImportError as error:
            raise ImportError('Shards need the litdata package: pip install "mir-lightning[shards]"') from error
        try:
            everything = StreamingDataset(self.folder, shuffle=True, seed=seed, transform=self.sample)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"shards: {self.folder} holds no shards that can be read: {error}") from error
        total = len(everything)
        counts = held_out, training_size(held_out, scale, total, f"in {self.folder}")
        # LitData rounds down.
        shares = [n / total if int(n / total * total) == n else math.nextafter(n / total, 1.0) for n in counts]
        first, training = train_test_split(everything, shares, seed=seed)
        samples = [self.sample(raw) for raw in first[0:held_out]]
        for line in (line for sample in samples for line in sample.unreadable):
            rank_zero_warn(f"left out of the probe: {line}")
        return training, [sample for sample in samples if not sample.unreadable]

    def sample(self, raw: Any) -> Sample:
        """Decode a stored record; one with an unreadable picture is a sample of nothing but the trouble."""
        where, picture = f"{self.folder}, a sample", b""
        if isinstance(raw, dict):
            where, picture = f"{self.folder}, sample {raw.get('id', 'without id')}", raw.get("image", b"")
            if not isinstance(picture, bytes):
                kind = type(picture).__name__
                raise ValueError(f"{where}: image must be the bytes of one picture, it is {kind}.")
            raw = {**raw, "image": ["stored"] * (bool(picture) or IMAGE in str(raw))}
        record = read_record(where, raw)
        try:
            images = tuple(read_image(BytesIO(picture), where) for _ in record.images)
        except UnreadableImageError as error:
            return Sample((), (), (str(error),))
        return Sample(images, record.turns, name=where)

    def stream(self, training: Any, collate: Collate, **options: Any) -> ShardsLoader:
        """LitData's loader."""
        return ShardsLoader(training, collate, **options)
