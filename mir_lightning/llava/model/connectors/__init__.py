"""What may stand between vision encoder and language model, by name; one file a kind."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mir_lightning.llava.model.connectors.attention_pool import attention_pool
from mir_lightning.llava.model.connectors.avg_pool import avg_pool
from mir_lightning.llava.model.connectors.c_abstractor import c_abstractor
from mir_lightning.llava.model.connectors.linear import linear
from mir_lightning.llava.model.connectors.mlp_norm import mlp_norm
from mir_lightning.llava.model.connectors.pixel_shuffle import pixel_shuffle
from mir_lightning.llava.model.connectors.resampler import resampler

CONNECTORS: dict[str, Callable[[Any], nn.Module]] = {
    "mlp": LlavaMultiModalProjector,
    "linear": linear,
    "mlp_norm": mlp_norm,
    "avg_pool": avg_pool,
    "attention_pool": attention_pool,
    "c_abstractor": c_abstractor,
    "pixel_shuffle": pixel_shuffle,
    "resampler": resampler,
}
"""By the name that ``model.connector`` takes. Each makes, of the model's config, a module of features
``[images, n, d_vision]`` to vision tokens ``[images, k, d]``; ``config.visual_tokens`` is the k asked for."""
