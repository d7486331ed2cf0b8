"""Connectors of learned queries, which look for what they need in all features, CLS too."""

import math
from typing import Any

import torch
from torch import Tensor, nn


def heads(width: int) -> int:
    """16, or as many fewer as divide the width."""
    return math.gcd(width, 16)


class QueryConnector(nn.Module):
    """Learned queries through ``attention`` to the features, which learn their places, then a linear layer.

    Args:
        config: of the model; it makes ``config.visual_tokens`` tokens, for None as many as there are features.
        attention: of queries ``[images, k, d_vision]`` and features ``[images, n, d_vision]``, as the queries.

    Raises:
        ValueError: for more tokens than features, or none.
    """

    def __init__(self, config: Any, attention: nn.Module) -> None:
        super().__init__()
        width, features = config.vision_config.hidden_size, config.features_per_image
        tokens = features if config.visual_tokens is None else config.visual_tokens
        if not 1 <= tokens <= features:
            raise ValueError(
                f"model.visual_tokens: {config.connector} makes 1 to {features} tokens, as many as a picture "
                f"has features, got {tokens}."
            )
        self.queries = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.places = nn.Parameter(0.02 * torch.randn(features, width))
        self.norm = nn.LayerNorm(width)
        self.attention = attention
        self.to_llm = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """``[images, n, d_vision]`` -> ``[images, k, d]``."""
        queries = self.queries.expand(len(features), -1, -1)
        tokens: Tensor = self.to_llm(self.attention(queries, self.norm(features) + self.places))
        return tokens
