"""Reading pictures that may be anything: broken, missing, gigantic, or just of another kind."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from PIL import Image


class UnreadableImageError(ValueError):
    """A picture that cannot be used; says which and why."""


def read_image(
    source: Path | BytesIO, name: str | None = None, min_side: int = 2, max_pixels: int = 100_000_000
) -> Image.Image:
    """An RGB picture; CMYK, palette, grey and transparent ones are converted.

    Args:
        source: a file, or its contents.
        name: what to call it in errors; its path when None.
        min_side: smaller ones, such as the single pixels that stand for dead links, are refused.
        max_pixels: larger ones are refused before they are decoded: they may be decompression bombs.

    Raises:
        UnreadableImageError: if the file is missing, empty, broken, cut off, too small or too large.
    """
    name = name or str(source)
    try:
        with Image.open(source) as image:
            if image.width * image.height > max_pixels:
                raise UnreadableImageError(f"{name}: {image.width} x {image.height} pixels, above {max_pixels:,}")
            if min(image.size) < min_side:
                raise UnreadableImageError(f"{name}: {image.width} x {image.height} pixels, too small")
            return image.convert("RGB")
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders fail in ways of their own
        raise UnreadableImageError(f"{name}: {error}") from error
