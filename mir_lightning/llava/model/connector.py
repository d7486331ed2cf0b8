"""Between vision encoder and language model: LLaVA's projector, or another connector by name."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

FeatureSelect = Literal["default", "full"]

CONNECTORS: dict[str, Callable[[LlavaConfig], nn.Module]] = {"mlp": LlavaMultiModalProjector}
"""By the name that ``model.connector`` takes: makes a module, ``[images, n, d_vision]`` -> ``[images, n, d]``."""


class ConnectedLlavaConfig(LlavaConfig):
    """Of a LLaVA with a connector of another kind."""

    model_type = "connected_llava"
    connector: str = "mlp"


class ConnectedLlava(LlavaForConditionalGeneration):
    """A LLaVA whose connector is the one that its config names; Hugging Face's Auto classes load it."""

    config_class = ConnectedLlavaConfig

    def __init__(self, config: ConnectedLlavaConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = CONNECTORS[config.connector](config)


AutoConfig.register(ConnectedLlavaConfig.model_type, ConnectedLlavaConfig)
AutoModelForImageTextToText.register(ConnectedLlavaConfig, ConnectedLlava)


def extra_features(config: PreTrainedConfig) -> int:
    """How many features an encoder has beside those of its patches: a CLS token, registers; none for SigLIP."""
    encoder: Any = MODEL_MAPPING[type(config)]
    side = config.image_size
    with torch.device("meta"):
        features = encoder(config)(pixel_values=torch.empty(1, 3, side, side)).last_hidden_state
    return features.shape[1] - (side // config.patch_size) ** 2


def connect(
    llm: PreTrainedModel,
    vision: PreTrainedModel,
    image_token: int,
    layer: int,
    select: FeatureSelect,
    connector: str = "mlp",
) -> LlavaForConditionalGeneration:
    """A LLaVA of a causal language model and an encoder, with an untrained connector of :data:`CONNECTORS`.

    The connector gets the features of one ``layer`` of the encoder: all with ``select="full"`` or where there is
    no CLS, else all but the first. ``image_token`` is the id of the placeholder of vision tokens.

    Raises:
        ValueError: for an unknown connector.
    """
    if connector not in CONNECTORS:
        raise ValueError(f"connector must be one of {', '.join(CONNECTORS)}, got {connector!r}.")
    extra = extra_features(vision.config)
    patches = (vision.config.image_size // vision.config.patch_size) ** 2
    select = select if extra else "full"
    plain = connector == "mlp"  # then any tool that knows LLaVA knows the model
    settings: dict[str, Any] = {
        "vision_config": vision.config,
        "text_config": llm.config,
        "image_token_index": image_token,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": select,
        "image_seq_length": patches + extra - (select == "default"),
        "tie_word_embeddings": llm.config.tie_word_embeddings,
    }
    kind: Any = LlavaForConditionalGeneration if plain else ConnectedLlava
    model = kind(kind.config_class(**settings, **({} if plain else {"connector": connector})))
    model.model.language_model.load_state_dict(llm.base_model.state_dict())
    model.lm_head.load_state_dict(llm.get_output_embeddings().state_dict())
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.generation_config = copy.deepcopy(llm.generation_config)  # where it stops, for one
    for part in model.model.multi_modal_projector.modules() if plain else ():
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    return model
