"""A probe's batches with their masks, as they are or in smaller parts; each is made when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mir_lightning.probing.probe import Batch, Probe
from mir_lightning.vlm import TokenMasks


class MaskedBatches:
    """Inputs and masks of every batch of a probe, each cut in two ``halvings`` times, down to single samples."""

    def __init__(self, probe: Probe | Sequence[Batch], masks: Sequence[TokenMasks], halvings: int = 0) -> None:
        self.probe = probe
        self.masks = masks
        self.halvings = halvings
        self.parts: list[tuple[int, slice]] = []  # of each, the batch it is cut from and its samples there
        for index, mask in enumerate(masks):
            samples = len(mask.vision)
            size = max(1, -(-samples // 2**halvings))
            self.parts += [(index, slice(start, start + size)) for start in range(0, samples, size)]

    def halved(self) -> MaskedBatches | None:
        """The same samples in halves of these batches; ``None`` if they are single samples already."""
        halved = MaskedBatches(self.probe, self.masks, self.halvings + 1)
        return halved if len(halved) > len(self) else None

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def samples(self) -> int:
        """Number of samples in all."""
        return sum(len(mask.vision) for mask in self.masks)

    def first_sample(self, index: int) -> int:
        """Number of a part's first sample, counted from 0 over the whole probe."""
        batch_index, samples = self.parts[index]
        return sum(len(mask.vision) for mask in self.masks[:batch_index]) + samples.start

    def __getitem__(self, index: int) -> tuple[Batch, TokenMasks]:
        """One part; a ``torch.OutOfMemoryError`` if its batch cannot be cut."""
        batch_index, samples = self.parts[index]
        batch, masks = self.probe[batch_index], self.masks[batch_index]
        total = len(masks.vision)
        if samples.start == 0 and samples.stop >= total:
            return batch, masks
        # A picture a sample by number only: the pictures of one sample may be several, and another has none.
        unsure = not bool(masks.vision.any(dim=1).all())
        part = {key: _cut(key, value, samples, total, unsure) for key, value in batch.items()}
        return part, TokenMasks(masks.vision[samples], masks.text[samples])


def _cut(key: str, value: Any, samples: slice, total: int, unsure: bool) -> Any:
    """The samples' part of an entry: its rows or items, or those of what is in it; a plain value is of all."""
    if value is None or isinstance(value, (str, bytes, bool, int, float, torch.dtype, torch.device)):
        return value
    if isinstance(value, Mapping):
        return {name: _cut(f"{key}.{name}", inner, samples, total, unsure) for name, inner in value.items()}
    listed = isinstance(value, (list, tuple)) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0)
    doubt = _doubt(value, unsure) if listed and len(value) == total else "it has no row for each"
    if doubt is None:
        return value[samples]
    raise torch.OutOfMemoryError(
        f"a batch of the probe does not fit into memory and cannot be cut in two by {key}: {doubt} of its {total} "
        "samples. Give the probe smaller batches."
    )


def _doubt(value: Any, unsure: bool) -> str | None:
    """Why as many entries as samples might not be one of each."""
    if isinstance(value, (Tensor, np.ndarray)):
        pictures = value.ndim > 2 and any(kind in str(value.dtype) for kind in ("float", "uint8"))
    elif all(isinstance(item, (int, float, complex)) or getattr(item, "ndim", None) == 0 for item in value):
        return "its numbers may be one of each (as a tensor they would be), or all be"
    else:
        pictures = not any(item is None or isinstance(item, (str, bytes, list, tuple, Mapping)) for item in value)
    return "it has an entry for each by number only, and pictures may be several" if pictures and unsure else None
