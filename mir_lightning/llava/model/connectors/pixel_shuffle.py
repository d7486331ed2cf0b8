"""Neighbouring patches side by side in one token: fewer tokens, nothing averaged away."""

from typing import Any

from torch import nn

from mir_lightning.llava.model.connectors.grid import GridConnector, patch_grid, pooled_grid
from mir_lightning.llava.model.connectors.mlp_norm import normed_mlp


def pixel_shuffle(config: Any) -> GridConnector:
    """Squares of n x n patches, n * n times as wide, and an MLP (InternVL 1.5, arXiv 2404.16821, section 3.1)."""
    cell = patch_grid(config.vision_config)[0] // pooled_grid(config)[0]
    return GridConnector(
        config, nn.PixelUnshuffle(cell), normed_mlp(config.vision_config.hidden_size * cell * cell, config)
    )
