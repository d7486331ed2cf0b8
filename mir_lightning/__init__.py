"""Modality Integration Rate for vision-language pre-training.

Public names are imported when they are first used, so that commands answer before PyTorch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mir_lightning.callbacks import ImageGainCallback, MIRCallback, SDSCallback
    from mir_lightning.metrics import ImageGain, ModalityIntegrationRate, SoftDiscriminationScore
    from mir_lightning.probing import ImageGainResult, MIRResult, Probe, evaluate_image_gain, evaluate_mir

__all__ = [
    "ImageGain",
    "ImageGainCallback",
    "ImageGainResult",
    "MIRCallback",
    "MIRResult",
    "ModalityIntegrationRate",
    "Probe",
    "SDSCallback",
    "SoftDiscriminationScore",
    "evaluate_image_gain",
    "evaluate_mir",
]

_HOMES = {
    "callbacks": ("ImageGainCallback", "MIRCallback", "SDSCallback"),
    "metrics": ("ImageGain", "ModalityIntegrationRate", "SoftDiscriminationScore"),
    "probing": ("ImageGainResult", "MIRResult", "Probe", "evaluate_image_gain", "evaluate_mir"),
    "functional": (),
    "moca": (),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name == home or name in names:
            module = import_module(f"mir_lightning.{home}")
            return module if name == home else getattr(module, name)
    raise AttributeError(f"module 'mir_lightning' has no attribute {name!r}")
