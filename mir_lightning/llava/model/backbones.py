"""Where the recipe's model comes from: any LLM and vision encoder joined as a LLaVA, a VLM, or packaged parts."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from mir_lightning.llava.demo.weights import build_packaged_llava, build_packaged_processor
from mir_lightning.llava.model.connector import FeatureSelect, connect, llava_config, llava_processor
from mir_lightning.llava.model.resolution import check_multiple, made_size, resize_encoder, resize_pictures
from mir_lightning.llava.model.saving import load_processor, load_vlm, load_whole
from mir_lightning.llava.model.upcycling import Upcycling, upcycle

_IMAGE = "<image>"


@dataclass(frozen=True)
class ModelSource:
    """Which model to train.

    Args:
        llm: folder or hub id of any causal language model.
        vision: folder or hub id of a CLIP, SigLIP or DINOv2 style encoder. Without any of the three: the packaged
            SmolLM2-135M and EfficientNet-Lite0.
        vlm: folder or hub id of a whole vision-language model to go on with, or a ``.ckpt`` of an earlier run,
            instead of the two.
        feature_layer: layer of the encoder whose features the projector gets; -2 is LLaVA-1.5's.
        feature_select: ``"default"`` drops the first feature (CLS), if the encoder has one; ``"full"`` keeps all.
        attention: implementation, ``"sdpa"``, ``"flash_attention_2"`` or ``"eager"``.
        connector: between the two, a name of :data:`~mir_lightning.llava.model.connectors.CONNECTORS`.
        visual_tokens: how many a picture takes in the sequence; as many as the connector can make by default.
        image_size: of the pictures that the encoder sees, in pixels a side, a multiple of its patch; what its
            image processor makes by default.
        tiles: cut pictures into as many at most, each of that size, as LLaVA-NeXT does; the whole comes first.
        upcycle: make a mixture of experts of the dense LLM.
    """

    llm: str | None = None
    vision: str | None = None
    vlm: str | None = None
    feature_layer: int = -2
    feature_select: FeatureSelect = "default"
    attention: str = "sdpa"
    connector: str = "mlp"
    visual_tokens: int | None = None
    image_size: int | None = None
    tiles: int | None = None
    upcycle: Upcycling | None = None

    def __post_init__(self) -> None:
        if self.vlm is not None and (self.llm or self.vision):
            raise ValueError("model: give vlm, or llm and vision, not both; set what a config gives to null.")
        for name in (
            ("connector", "visual_tokens", "image_size", "tiles", "upcycle") if self.vlm is not None else ()
        ):
            if (given := getattr(self, name)) != getattr(ModelSource, name):
                raise ValueError(
                    f"model: vlm comes with its own {name}: {name}={given!r} goes with llm and vision."
                )
        if (self.llm is None) != (self.vision is None):
            raise ValueError(f"model: llm and vision go together, got llm={self.llm!r}, vision={self.vision!r}.")


def build_model(source: ModelSource, processor: Any) -> PreTrainedModel:
    """The model of a source, float32, with an untrained projector unless it is a whole one."""
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": source.attention}
    if source.vlm is not None:
        return load_vlm(source.vlm, **options)
    if source.llm is None or source.vision is None:
        sizes = source.connector, source.visual_tokens, source.image_size, source.tiles
        return build_packaged_llava(*sizes, source.upcycle)
    llm = load_whole(transformers.AutoModelForCausalLM, source.llm, **options)
    if len(processor.tokenizer) > llm.config.vocab_size:
        llm.resize_token_embeddings(len(processor.tokenizer))
    if source.upcycle is not None:
        llm = upcycle(llm, source.upcycle)
    config = _vision_config(source.vision)
    encoder: Any = transformers.MODEL_MAPPING[type(config)]
    vision = load_whole(encoder, source.vision, parts=True, config=config, **options)
    vision = resize_encoder(vision, made_size(processor.image_processor))
    return connect(llm, vision, _joint(source, llm.config, vision.config, processor.tokenizer))


def build_processor(source: ModelSource) -> Any:
    """Tokenizer and image processor of a source; the tokenizer gets an ``<image>`` token where it has none."""
    if source.vlm is not None:
        return load_processor(source.vlm)
    if source.llm is None or source.vision is None:
        return build_packaged_processor(source.connector, source.visual_tokens, source.image_size, source.tiles)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.llm)
    if _IMAGE not in tokenizer.get_vocab():
        tokenizer.add_tokens([_IMAGE], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    images = transformers.AutoImageProcessor.from_pretrained(source.vision)
    text, vision = AutoConfig.from_pretrained(source.llm), _vision_config(source.vision)
    if source.image_size is not None:
        check_multiple(source.image_size, vision.patch_size)
        resize_pictures(images, source.image_size)
    vision.image_size = made_size(images)
    return llava_processor(_joint(source, text, vision, tokenizer), images, tokenizer)


def _joint(
    source: ModelSource, text: PreTrainedConfig, vision: PreTrainedConfig, tokenizer: Any
) -> PreTrainedConfig:
    image_token = tokenizer.convert_tokens_to_ids(_IMAGE)
    features = (source.feature_layer, source.feature_select)
    return llava_config(text, vision, image_token, *features, source.connector, source.visual_tokens, source.tiles)


def _vision_config(place: str) -> PreTrainedConfig:
    """Of the encoder alone: a CLIP or SigLIP folder holds a text model too."""
    config = AutoConfig.from_pretrained(place)
    return getattr(config, "vision_config", config)
