"""The functionals as torchmetrics Metrics: streaming, merged across ranks."""

from mir_lightning.metrics.discrimination import SoftDiscriminationScore
from mir_lightning.metrics.mir import ModalityIntegrationRate

__all__ = ["ModalityIntegrationRate", "SoftDiscriminationScore"]
