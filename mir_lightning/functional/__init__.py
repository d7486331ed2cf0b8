"""Mathematics on tensors: no state, no model."""

from mir_lightning.functional.frechet import frechet_distance, trace_sqrt_product
from mir_lightning.functional.image_gain import image_gain
from mir_lightning.functional.influence import mir_influence, standard_error
from mir_lightning.functional.mir import modality_integration_rate
from mir_lightning.functional.sds import soft_discrimination_score

__all__ = [
    "frechet_distance",
    "image_gain",
    "mir_influence",
    "modality_integration_rate",
    "soft_discrimination_score",
    "standard_error",
    "trace_sqrt_product",
]
