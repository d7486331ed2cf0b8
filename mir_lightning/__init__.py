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


def __getattr__(name: str) -> Any:
    for home in ("metrics", "probing", "callbacks", "functional", "moca"):  # from the lowest floor that exports it
        if name == home or name in __all__:
            module = import_module(f"mir_lightning.{home}")
            if name == home or hasattr(module, name):
                return module if name == home else getattr(module, name)
    raise AttributeError(f"module 'mir_lightning' has no attribute {name!r}")
