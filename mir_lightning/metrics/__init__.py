"""The functionals as torchmetrics Metrics: streaming, merged across ranks."""

from mir_lightning.metrics.image_gain import ImageGain
from mir_lightning.metrics.mir import ModalityIntegrationRate
from mir_lightning.metrics.sds import SoftDiscriminationScore

__all__ = ["ImageGain", "ModalityIntegrationRate", "SoftDiscriminationScore"]
