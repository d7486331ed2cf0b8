"""A LLaVA of a language model, a vision encoder, and a connector by name."""

import copy
import math
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from mir_lightning.llava.model.connectors import CONNECTORS
from mir_lightning.llava.model.connectors.grid import patch_grid, picture_size
from mir_lightning.llava.model.tiles import tile_grids, tiled

FeatureSelect = Literal["default", "full"]


class ConnectedLlavaConfig(LlavaConfig):
    """Of a LLaVA with a connector of another kind."""

    model_type = "connected_llava"
    connector: str = "mlp"
    visual_tokens: int | None = None  # asked of the connector; image_seq_length is what it makes
    features_per_image: int = 576  # that it gets


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
    height, width = patch_grid(config)
    with torch.device("meta"):
        pixels = torch.empty(1, 3, *picture_size(config))
        features = encoder(config)(pixel_values=pixels).last_hidden_state
    return features.shape[1] - height * width


def llava_config(
    text: PreTrainedConfig,
    vision: PreTrainedConfig,
    image_token: int,
    layer: int,
    select: FeatureSelect,
    connector: str = "mlp",
    visual_tokens: int | None = None,
    tiles: int | None = None,
) -> PreTrainedConfig:
    """Of a LLaVA of a language model and an encoder, by their configs, and a connector of :data:`CONNECTORS`.

    The connector gets the features of one ``layer`` of the encoder: all with ``select="full"`` or where there is
    no CLS, else all but the first; ``visual_tokens`` is what it makes of a picture, None for as many as it can.
    ``image_token`` is the id of their placeholder. With ``tiles``, how many a picture is cut into at most, it is a
    LLaVA-NeXT's.

    Raises:
        ValueError: for an unknown connector, or one that cannot make so many tokens or does not go with tiles.
    """
    if connector not in CONNECTORS:
        raise ValueError(f"model.connector must be one of {', '.join(CONNECTORS)}, got {connector!r}.")
    extra = extra_features(vision)
    select = select if extra else "full"
    patches = math.prod(patch_grid(vision))
    features = patches + extra - (select == "default")
    settings: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": image_token,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": select,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    own: dict[str, Any] = {"connector": connector, "visual_tokens": visual_tokens, "features_per_image": features}
    config = ConnectedLlavaConfig(**settings, **own)
    with torch.device("meta"):
        made = CONNECTORS[connector](config)(torch.empty(1, features, vision.hidden_size)).shape[1]
    if visual_tokens not in (None, made):
        raise ValueError(
            f"model.visual_tokens: {connector} makes {made} tokens of a picture, got {visual_tokens}."
        )
    settings["image_seq_length"] = made
    if tiles is not None:
        if connector != "mlp":
            raise ValueError(f"model.tiles goes with model.connector=mlp alone, got {connector!r}.")
        if extra and (select, extra) != ("default", 1):
            raise ValueError(
                f"model.tiles needs the features of patches alone, got {features} of {patches} patches."
            )
        return LlavaNextConfig(**settings, image_grid_pinpoints=tile_grids(tiles, vision.image_size))
    if connector == "mlp":  # then any tool that knows LLaVA knows the model
        return LlavaConfig(**settings)
    config.image_seq_length = made
    return config


def llava_processor(config: Any, images: Any, tokenizer: Any) -> Any:
    """Of such a model: each ``<image>`` becomes as many placeholders as the connector makes tokens."""
    select, vision = config.vision_feature_select_strategy, config.vision_config
    tiles = isinstance(config, LlavaNextConfig)
    kind: Any = LlavaNextProcessor if tiles else LlavaProcessor
    return kind(
        image_processor=tiled(images, config.image_grid_pinpoints) if tiles else images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=config.image_seq_length
        - math.prod(patch_grid(vision))
        + (select == "default"),
        image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
    )


def connect(llm: PreTrainedModel, vision: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config that :func:`llava_config` made of both, with an untrained connector."""
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    model = kind(config)
    model.model.language_model.load_state_dict(llm.base_model.state_dict())
    model.lm_head.load_state_dict(llm.get_output_embeddings().state_dict())
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.generation_config = copy.deepcopy(llm.generation_config)  # where it stops, for one
    for part in model.model.multi_modal_projector.modules() if kind is not ConnectedLlava else ():
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    return model


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The last linear layer of a model's connector."""
    return [part for part in model.model.multi_modal_projector.modules() if isinstance(part, nn.Linear)][-1]
