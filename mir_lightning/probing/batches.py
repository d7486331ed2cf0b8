"""A probe's batches with their masks, as they are or in smaller parts; each is made when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mir_lightning.probing.probe import Batch, Probe
from mir_lightning.vlm import TextPositions, TokenMasks, check_takes_pixels, find_decoder, token_masks

MaskedBatch = tuple[Batch, TokenMasks]


class MaskedBatches(Sequence[MaskedBatch]):
    """Inputs and masks of every batch of a probe.

    Args:
        probe: the probe.
        masks: of each of its batches.
        halvings: how often each batch is cut in two, down to single samples.
    """

    def __init__(self, probe: Probe, masks: Sequence[TokenMasks], halvings: int = 0) -> None:
        self.probe = probe
        self.masks = masks
        self.halvings = halvings
        self._parts: list[tuple[int, slice]] = []
        for index, mask in enumerate(masks):
            samples = len(mask.vision)
            size = max(1, -(-samples // 2**halvings))
            self._parts += [(index, slice(start, start + size)) for start in range(0, samples, size)]

    def halved(self) -> MaskedBatches | None:
        """The same samples in halves of these batches; ``None`` if they are single samples already."""
        halved = MaskedBatches(self.probe, self.masks, self.halvings + 1)
        return halved if len(halved) > len(self) else None

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> MaskedBatch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[MaskedBatch]: ...
    def __getitem__(self, index: int | slice) -> MaskedBatch | Sequence[MaskedBatch]:
        """One part; a ``torch.OutOfMemoryError`` if its batch cannot be cut."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch_index, samples = self._parts[index]
        batch, masks = self.probe[batch_index], self.masks[batch_index]
        if samples.start == 0 and samples.stop >= len(masks.vision):
            return batch, masks
        return _samples_of(batch, samples, len(masks.vision)), TokenMasks(
            masks.vision[samples], masks.text[samples]
        )


def _samples_of(batch: Batch, samples: slice, total: int) -> dict[str, Any]:
    return {key: _cut(key, value, samples, total) for key, value in batch.items()}


def _cut(key: str, value: Any, samples: slice, total: int) -> Any:
    """The samples' part of an entry: its rows or items, or those of what is in it; a plain value is of all."""
    if value is None or isinstance(value, (str, bytes, bool, int, float, torch.dtype, torch.device)):
        return value
    if isinstance(value, Mapping):
        return {name: _cut(f"{key}.{name}", inner, samples, total) for name, inner in value.items()}
    if isinstance(value, (Tensor, np.ndarray, list, tuple)) and np.ndim(value) and len(value) == total:
        return value[samples]
    raise torch.OutOfMemoryError(
        f"a batch of the probe does not fit into memory and cannot be cut in two: {key} has no row for each of "
        f"its {total} samples. Give the probe smaller batches."
    )


def check_probe(
    model: PreTrainedModel | None,
    probe: Probe,
    text: TextPositions,
    layers: str | None = None,
    image_token_id: int | None = None,
) -> list[TokenMasks]:
    """Vision and text positions of each batch, and all that can be known without running the model.

    Raises:
        ValueError: if the model is of a kind that MIR is not defined for, its parts are not found, a mask does
            not fit, or a modality has fewer than two tokens in all.
    """
    if model is not None:
        find_decoder(model, layers)
        if "vision_mask" not in probe[0]:
            check_takes_pixels(model)
    config = None if model is None else model.config
    masks = [token_masks(config, batch, text, image_token_id) for batch in probe]
    for modality, hint in (
        ("vision", "is the image token id right, and do the texts hold image placeholders?"),
        ("text", 'does text follow the image? text="all" counts what precedes it too.'),
    ):
        count = int(sum(getattr(m, modality).sum() for m in masks))
        if count < 2:
            raise ValueError(f"the probe has {count} {modality} tokens and needs at least 2: {hint}")
    return masks
