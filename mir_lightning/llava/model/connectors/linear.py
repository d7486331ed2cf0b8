"""One linear layer, as in the first LLaVA."""

from typing import Any

from torch import nn


def linear(config: Any) -> nn.Linear:
    """Each feature for itself (LLaVA, arXiv 2304.08485, section 4.1)."""
    return nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
