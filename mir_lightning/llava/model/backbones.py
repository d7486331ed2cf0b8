"""Where the recipe's model comes from: any LLM and vision encoder joined as a LLaVA, a VLM, or packaged parts."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, LlavaProcessor, PreTrainedConfig, PreTrainedModel

from mir_lightning.llava.demo.weights import build_packaged_llava, build_packaged_processor
from mir_lightning.llava.model.connector import FeatureSelect, connect, extra_features
from mir_lightning.llava.model.saving import load_processor, load_vlm, load_whole
from mir_lightning.llava.model.upcycling import Upcycling, upcycle


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
        connector: between the two; LLaVA's ``"mlp"``, or one of your own.
        upcycle: make a mixture of experts of the dense LLM.
    """

    llm: str | None = None
    vision: str | None = None
    vlm: str | None = None
    feature_layer: int = -2
    feature_select: FeatureSelect = "default"
    attention: str = "sdpa"
    connector: str = "mlp"
    upcycle: Upcycling | None = None

    def __post_init__(self) -> None:
        if self.vlm is not None and (self.llm or self.vision):
            raise ValueError("model: give vlm, or llm and vision, not both; set what a config gives to null.")
        if (self.llm is None) != (self.vision is None):
            raise ValueError(f"model: llm and vision go together, got llm={self.llm!r}, vision={self.vision!r}.")
        if self.vlm is not None and self.upcycle is not None:
            raise ValueError("model: upcycle is of an llm, not of a whole vlm; set one of them to null.")


def build_model(source: ModelSource, processor: LlavaProcessor) -> PreTrainedModel:
    """The model of a source, float32, with an untrained projector unless it is a whole one."""
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": source.attention}
    if source.vlm is not None:
        return load_vlm(source.vlm, **options)
    if source.llm is None or source.vision is None:
        return build_packaged_llava(source.upcycle)
    llm = load_whole(transformers.AutoModelForCausalLM, source.llm, **options)
    if len(processor.tokenizer) > llm.config.vocab_size:
        llm.resize_token_embeddings(len(processor.tokenizer))
    if source.upcycle is not None:
        llm = upcycle(llm, source.upcycle)
    config = _vision_config(source.vision)
    encoder: Any = transformers.MODEL_MAPPING[type(config)]
    vision = load_whole(encoder, source.vision, parts=True, config=config, **options)
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return connect(llm, vision, image_token, source.feature_layer, source.feature_select, source.connector)


def build_processor(source: ModelSource) -> LlavaProcessor:
    """Tokenizer and image processor of a source; the tokenizer gets an ``<image>`` token where it has none."""
    if source.vlm is not None:
        return load_processor(source.vlm)
    if source.llm is None or source.vision is None:
        return build_packaged_processor()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.llm)
    if "<image>" not in tokenizer.get_vocab():
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = _vision_config(source.vision)
    extra = extra_features(config)
    return LlavaProcessor(
        image_processor=transformers.AutoImageProcessor.from_pretrained(source.vision),
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy=source.feature_select if extra else "full",
        num_additional_image_tokens=extra,
        image_token="<image>",
    )


def _vision_config(place: str) -> PreTrainedConfig:
    """Of the encoder alone: a CLIP or SigLIP folder holds a text model too."""
    config = AutoConfig.from_pretrained(place)
    return getattr(config, "vision_config", config)
