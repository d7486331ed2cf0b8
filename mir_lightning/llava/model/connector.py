"""Between vision encoder and language model: LLaVA's projector, an MLP of two layers."""

import copy
from typing import Any, Literal

import torch
from transformers import (
    MODEL_MAPPING,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

FeatureSelect = Literal["default", "full"]


def extra_features(config: PreTrainedConfig) -> int:
    """How many features an encoder has beside those of its patches: a CLS token, registers; none for SigLIP."""
    encoder: Any = MODEL_MAPPING[type(config)]
    side = config.image_size
    with torch.device("meta"):
        features = encoder(config)(pixel_values=torch.empty(1, 3, side, side)).last_hidden_state
    return features.shape[1] - (side // config.patch_size) ** 2


def connect(
    llm: PreTrainedModel, vision: PreTrainedModel, image_token: int, layer: int, select: FeatureSelect
) -> LlavaForConditionalGeneration:
    """A LLaVA of a causal language model and an encoder, with LLaVA's own projector, untrained.

    The projector gets the features of one ``layer`` of the encoder: all with ``select="full"`` or where there is
    no CLS, else all but the first. ``image_token`` is the id of the placeholder of vision tokens.
    """
    extra = extra_features(vision.config)
    select = select if extra else "full"
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=llm.config,
        image_token_index=image_token,
        vision_feature_layer=layer,
        vision_feature_select_strategy=select,
        image_seq_length=(vision.config.image_size // vision.config.patch_size) ** 2
        + (extra - (select == "default")),
        tie_word_embeddings=llm.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(llm.base_model.state_dict())
    model.lm_head.load_state_dict(llm.get_output_embeddings().state_dict())
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.generation_config = copy.deepcopy(llm.generation_config)  # where it stops, for one
    model.model.multi_modal_projector.linear_1.reset_parameters()
    model.model.multi_modal_projector.linear_2.reset_parameters()
    return model
