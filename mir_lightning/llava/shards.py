"""Samples streamed from shards in LitData's format, from a folder or an object store, resumable in mid-epoch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")  # it would ask the package index

try:
    from litdata import StreamingDataLoader, StreamingDataset, train_test_split
except ImportError as error:
    raise ImportError('data.shards needs the litdata package: pip install "mir-lightning[shards]"') from error

from mir_lightning.llava.datasets import Sample
from mir_lightning.llava.prompts import IMAGE
from mir_lightning.llava.records import read_record
from mir_lightning.llava.throughput import TimedLoader
from mir_lightning.probing.images import UnreadableImageError, read_image


def open_shards(place: str, probe_size: int, data_scale: int | None, seed: int) -> tuple[Any, list[Sample]]:
    """Shards to train on, and the samples held out of them.

    A sample is a record of LLaVA's format whose ``image`` is the bytes of its picture, empty for text alone. Whole
    shards are drawn at random, the held-out samples first. Over several ranks each gets whole shards, and an epoch
    ends for all where the rank with the fewest samples is through: the rest is left out of that epoch.

    Args:
        place: folder, ``s3://``, ``gs://`` or what else LitData reads.
        probe_size: number of held-out samples; unreadable ones are left out, with a warning.
        data_scale: number of training samples, all others when None.
        seed: of the draw, and of the order.

    Raises:
        ValueError: if there are no shards, or too few samples in them.
    """
    try:
        everything = StreamingDataset(place, shuffle=True, seed=seed, transform=partial(_to_sample, place))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"shards: {place} holds no shards that can be read: {error}") from error
    total = len(everything)
    wanted = data_scale or total - probe_size
    if wanted < 1 or probe_size + wanted > total:
        raise ValueError(
            f"data_scale={data_scale} and a probe of {probe_size} need more than the {total} samples in {place}."
        )
    held_out, training = train_test_split(
        everything, [_share(probe_size, total), _share(wanted, total)], seed=seed
    )
    samples = [_to_sample(place, raw) for raw in held_out[0:probe_size]]
    for line in (line for sample in samples for line in sample.unreadable):
        rank_zero_warn(f"left out of the probe: {line}")
    return training, [sample for sample in samples if not sample.unreadable]


def _share(count: int, total: int) -> float:
    """The smallest number that LitData, which rounds down, takes for ``count`` samples."""
    share = count / total
    return share if int(total * share) == count else math.nextafter(share, 1.0)


def _to_sample(place: str, raw: Any) -> Sample:
    """Decode a stored record; one with an unreadable picture is a sample of nothing but the trouble."""
    where = f"{place}, sample {raw.get('id', 'without id')}" if isinstance(raw, dict) else f"{place}, a sample"
    if isinstance(raw, dict) and not isinstance(raw.get("image", b""), bytes):
        raise ValueError(f"{where}: image must be the bytes of one picture, it is {type(raw['image']).__name__}.")
    picture = raw.get("image", b"") if isinstance(raw, dict) else b""
    shown = bool(picture) or IMAGE in str(raw)
    record = read_record(where, {**raw, "image": ["stored"] * shown} if isinstance(raw, dict) else raw)
    try:
        images = (read_image(BytesIO(picture), where),) if shown else ()
    except UnreadableImageError as error:
        return Sample((), (), (str(error),))
    return Sample(images, record.turns)


class ShardsLoader(TimedLoader, StreamingDataLoader):
    """LitData's loader: it knows where in the shards each worker is, and a Trainer saves that and goes on from it.

    Args:
        dataset: from :func:`open_shards`.
        batch_size: samples a batch, on each device.
        collate: makes a batch of samples.
        num_workers: processes that read; the same number has to go on after an interruption.
    """

    def __init__(
        self, dataset: Any, batch_size: int, collate: Callable[[Sequence[Sample]], Any], num_workers: int
    ) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=partial(_with_replacements, collate),
            generator=torch.Generator().manual_seed(0),  # leaves the global random state alone
        )

        self._loaded = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """An epoch, or the rest of the one that was loaded.

        LitData begins the next one only where the last was read to its end; a Trainer stops at the last batch.
        """
        if not self._loaded:
            self.restore = False
        self._loaded = False
        return super().__iter__()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state)
        self._loaded = True

    def state_dict(self) -> dict[str, Any]:
        """Where each worker is, in plain numbers, loadable with ``weights_only``."""
        plain: dict[str, Any] = _plain(super().state_dict())
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(of_key) for key, of_key in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _with_replacements(collate: Callable[[Sequence[Sample]], Any], samples: Sequence[Sample]) -> Any:
    """In place of an unreadable sample the next one of the batch, so that the loader's count stays right."""
    readable = [index for index, sample in enumerate(samples) if not sample.unreadable]
    if not readable:
        raise UnreadableImageError(f"a whole batch cannot be read: {'; '.join(s.unreadable[0] for s in samples)}")
    taken = []
    for index, sample in enumerate(samples):
        instead = samples[next((i for i in readable if i >= index), readable[0])]
        taken.append(Sample(instead.images, instead.turns, sample.unreadable))
    return collate(taken)
