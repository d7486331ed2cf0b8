"""Convolutions around a pooling, which keep what is where."""

from typing import Any

from torch import nn
from transformers import VitDetConfig
from transformers.models.vitdet.modeling_vitdet import VitDetResBottleneckBlock

from mir_lightning.llava.model.connectors.grid import GridConnector, pooled_grid
from mir_lightning.llava.model.connectors.mlp_norm import normed_mlp


def c_abstractor(config: Any, depth: int = 3) -> GridConnector:
    """``depth`` ResNet blocks, adaptive average pooling, as many again, and an MLP.

    Honeybee (arXiv 2312.06742, section 3.2) with the ResNet blocks of MM1 (arXiv 2403.09611, section 3.2):
    bottlenecks with layer norms, which need no statistics of a batch.
    """
    width = config.vision_config.hidden_size
    options = VitDetConfig(hidden_act="silu")
    before, after = (
        [VitDetResBottleneckBlock(options, width, width, width // 4) for _ in range(depth)] for _ in range(2)
    )
    pool = nn.AdaptiveAvgPool2d(pooled_grid(config, divides=False))
    return GridConnector(config, nn.Sequential(*before, pool, *after), normed_mlp(width, config))
