"""LLaVA's two layers behind a layer norm."""

from typing import Any

from torch import nn


def normed_mlp(width: int, config: Any) -> nn.Sequential:
    """``[..., width]`` -> ``[..., d]``, the language model's width."""
    out = config.text_config.hidden_size
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


def mlp_norm(config: Any) -> nn.Sequential:
    """Each feature for itself, normalised: encoders differ in the size of their features."""
    return normed_mlp(config.vision_config.hidden_size, config)
