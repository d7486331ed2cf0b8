"""Modality Integration Rate for vision-language pre-training."""

from mir_lightning.callbacks import MIRCallback
from mir_lightning.metrics import ModalityIntegrationRate
from mir_lightning.probing import MIRResult, Probe, evaluate_mir

__all__ = ["MIRCallback", "MIRResult", "ModalityIntegrationRate", "Probe", "evaluate_mir"]
