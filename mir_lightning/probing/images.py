"""Reading pictures that may be anything: broken, missing, gigantic, sideways, or just of another kind."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mir_lightning.files import regular_file

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")  # none that runs a program
_WHITE = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535}  # of modes with more than 8 bits
_LEAST_SIDE, _MOST_PIXELS = 2, 100_000_000  # a single pixel stands for a dead link; more may be a bomb


class UnreadableImageError(ValueError):
    """A picture that cannot be used; says which and why."""


def read_image(source: str | Path | BytesIO, name: str | None = None) -> Image.Image:
    """An RGB picture, as a viewer shows it: turned as its EXIF says, and 16 bits or floats scaled by their range.

    CMYK, palette, grey and transparent pictures are converted. Whole numbers of more than 8 bits run from 0 to
    65535; floats from 0 to 1, or to 255; what lies outside runs from its smallest value to its largest.

    Args:
        source: a regular file, or its contents.
        name: what to call it in errors; its path when None.

    Raises:
        UnreadableImageError: if the file is missing, empty, broken, cut off, no regular file, of a format that is
            not listed, too small or too large.
    """
    from PIL import Image

    name = name or str(source)
    try:
        if not isinstance(source, BytesIO):
            regular_file(source)
        Image.init()
        with Image.open(source, formats=[f for f in _FORMATS if f in Image.OPEN]) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise UnreadableImageError(
                    f"{name}: {image.width} x {image.height} pixels, above {_MOST_PIXELS:,}"
                )
            if min(image.size) < _LEAST_SIDE:
                raise UnreadableImageError(f"{name}: {image.width} x {image.height} pixels, too small")
            return as_viewed(image)
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders fail in ways of their own
        raise UnreadableImageError(f"{name}: {error}") from error


def as_viewed(image: Image.Image) -> Image.Image:
    """A picture as a viewer shows it, RGB; see :func:`read_image`."""
    from PIL import ImageOps

    return _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 8 bits, of a picture with more."""
    from PIL import Image

    if image.mode not in (*_WHITE, "I", "F"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("holds NaN or inf")
    black, white = 0.0, float(_WHITE.get(image.mode, 65535))
    if image.mode == "F":
        white = 1.0 if values.max() <= 1 else 255.0
    if values.min() < black or values.max() > white:
        black, white = values.min(), values.max()
    return Image.fromarray(((values - black) / ((white - black) or 1) * 255).round().astype(np.uint8))
