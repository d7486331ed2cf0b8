"""Mathematics on tensors: no state, no model."""

from mir_lightning.functional.discrimination import soft_discrimination_score
from mir_lightning.functional.frechet import frechet_distance, trace_sqrt_product
from mir_lightning.functional.mir import modality_integration_rate

__all__ = ["frechet_distance", "modality_integration_rate", "soft_discrimination_score", "trace_sqrt_product"]
