"""Learnable modality calibration (MoCa) of the vision tokens in any decoder."""

from mir_lightning.moca.inject import (
    from_pretrained,
    inject_moca,
    load_moca,
    moca_parameters,
    moca_statistics,
    remove_moca,
    save_moca,
)
from mir_lightning.moca.layers import MoCa
from mir_lightning.moca.masks import vision_mask

__all__ = [
    "MoCa",
    "from_pretrained",
    "inject_moca",
    "load_moca",
    "moca_parameters",
    "moca_statistics",
    "remove_moca",
    "save_moca",
    "vision_mask",
]
