"""The functionals as torchmetrics Metrics: streaming, merged across ranks."""

from mir_lightning.metrics.mir import ModalityIntegrationRate
from mir_lightning.metrics.sds import SoftDiscriminationScore

__all__ = ["ModalityIntegrationRate", "SoftDiscriminationScore"]
