"""Modality Integration Rate for vision-language pre-training."""

from mir_lightning.callbacks import MIRCallback, SDSCallback
from mir_lightning.metrics import ModalityIntegrationRate, SoftDiscriminationScore
from mir_lightning.probing import MIRResult, Probe, evaluate_mir

__all__ = [
    "MIRCallback",
    "MIRResult",
    "ModalityIntegrationRate",
    "Probe",
    "SDSCallback",
    "SoftDiscriminationScore",
    "evaluate_mir",
]
