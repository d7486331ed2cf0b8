"""Average pooling of neighbouring patches."""

from typing import Any

from torch import nn

from mir_lightning.llava.model.connectors.grid import GridConnector, patch_grid, pooled_grid
from mir_lightning.llava.model.connectors.linear import linear


def avg_pool(config: Any) -> GridConnector:
    """The mean of n x n patches, then a linear layer (MM1, arXiv 2403.09611, section 3.2)."""
    cell = patch_grid(config.vision_config)[0] // pooled_grid(config)[0]
    return GridConnector(config, nn.AvgPool2d(cell), linear(config))
