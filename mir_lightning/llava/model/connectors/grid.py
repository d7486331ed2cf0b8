"""Connectors that see the patches as a picture: which sizes a grid can take, and the way to it and back."""

import math
from typing import Any

from torch import Tensor, nn


def picture_size(vision_config: Any) -> tuple[int, int]:
    """Height and width of an encoder's picture in pixels."""
    size = vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def patch_grid(vision_config: Any) -> tuple[int, int]:
    """Height and width of an encoder's picture in patches."""
    height, width = picture_size(vision_config)
    return height // vision_config.patch_size, width // vision_config.patch_size


def pooled_grid(config: Any, divides: bool = True) -> tuple[int, int]:
    """Height and width of the grid of ``config.visual_tokens``, of the patches' proportions; all patches for None.

    Raises:
        ValueError: if there is no such grid or, where ``divides``, its cells are not of whole patches.
    """
    height, width = patch_grid(config.vision_config)
    cells = math.gcd(height, width)
    sides = [side for side in range(1, cells + 1) if not divides or cells % side == 0]
    grids = {side * side * (height // cells) * (width // cells): side for side in sides}
    wanted = height * width if config.visual_tokens is None else config.visual_tokens
    if wanted not in grids:
        raise ValueError(
            f"model.visual_tokens: {config.connector} makes {', '.join(map(str, grids))} tokens of {height} x "
            f"{width} patches, got {wanted}."
        )
    return height // cells * grids[wanted], width // cells * grids[wanted]


class GridConnector(nn.Module):
    """Patches on their grid through ``pool``, each cell then through ``to_llm``; CLS and registers are dropped.

    Args:
        config: of the model.
        pool: ``[images, d_vision, height, width]`` -> ``[images, any, h, w]``.
        to_llm: ``[images, h * w, any]`` -> ``[images, h * w, d]``.
    """

    def __init__(self, config: Any, pool: nn.Module, to_llm: nn.Module) -> None:
        super().__init__()
        self.grid = patch_grid(config.vision_config)
        self.pool = pool
        self.to_llm = to_llm

    def forward(self, features: Tensor) -> Tensor:
        """``[images, n, d_vision]``, the patches last -> ``[images, h * w, d]``, row by row."""
        patches = features[:, -self.grid[0] * self.grid[1] :]
        pooled = self.pool(patches.transpose(1, 2).unflatten(2, self.grid))
        tokens: Tensor = self.to_llm(pooled.flatten(2).transpose(1, 2))
        return tokens
