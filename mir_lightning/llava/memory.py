"""What a model's training needs of a device's memory, before the first step is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from mir_lightning.llava.schedule import Stage, optimizer_groups

_FLOAT32 = 4


class TrainingMemory(NamedTuple):
    """Bytes a device; activations, logits and buffers of the libraries come on top.

    Attributes:
        weights: float32.
        gradients: of what learns at some stage.
        optimizer: AdamW's two moments of it.
    """

    weights: int
    gradients: int
    optimizer: int

    def __str__(self) -> str:
        weights, gradients, optimizer = (size / 1e9 for size in self)
        return (
            f"{sum(self) / 1e9:.1f} GB a device: weights {weights:.1f}, gradients {gradients:.1f}, AdamW "
            f"{optimizer:.1f}; activations come on top"
        )


def training_memory(vlm: PreTrainedModel, stages: Sequence[Stage], shards: int = 1) -> TrainingMemory:
    """Of a model with float32 weights (mixed precision keeps them, too) through all stages.

    Args:
        vlm: the model; on the meta device will do.
        stages: what trains when.
        shards: devices that share weights, gradients and optimizer (FSDP2); 1 where each holds all.
    """
    weights = sum(parameter.numel() for parameter in vlm.parameters())
    learning = sum(p.numel() for group in optimizer_groups(vlm, stages) for p in group.parameters)
    return TrainingMemory(*(_FLOAT32 * count // shards for count in (weights, learning, 2 * learning)))
