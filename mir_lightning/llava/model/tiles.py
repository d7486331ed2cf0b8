"""Pictures cut into tiles, as LLaVA-NeXT does: the encoder sees the whole, and each tile at full resolution."""

from typing import Any

from transformers import LlavaNextImageProcessorPil

from mir_lightning.llava.model.resolution import made_size


def tile_grids(tiles: int, image_size: int) -> list[list[int]]:
    """Sizes of all rectangles of so many tiles at most; a picture takes the best. A ``ValueError`` below 2."""
    if tiles < 2:
        raise ValueError(f"model.tiles must be 2 or more, got {tiles}.")
    sides = range(1, tiles + 1)
    return [
        [rows * image_size, columns * image_size] for rows in sides for columns in sides if rows * columns <= tiles
    ]


def tiled(images: Any, grids: list[list[int]]) -> LlavaNextImageProcessorPil:
    """An image processor that cuts, with the colours of one that does not."""
    side, given = made_size(images), images.to_dict()
    square = {"height": side, "width": side}
    colours = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return LlavaNextImageProcessorPil(
        image_grid_pinpoints=grids, size=square, crop_size=square, **{name: given[name] for name in colours}
    )
