"""Run a fixed probe through a live model."""

from mir_lightning.probing.evaluate import MIRResult, evaluate_mir
from mir_lightning.probing.probe import Probe

__all__ = ["MIRResult", "Probe", "evaluate_mir"]
