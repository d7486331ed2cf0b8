"""A probe as the MIR paper builds it: image number i with text number i, unrelated to each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mir_lightning.functional.checks import check_at_least_one
from mir_lightning.probing.probe import Batch, Probe

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
_TEXT_SUFFIXES = {".txt", ".story"}


def pair_probe(processor: Any, images: Path, texts: Path, num: int, batch_size: int = 4) -> Probe:
    """Pair the first ``num`` images and texts of two folders, in the order of their names.

    Args:
        processor: the model's processor, with an ``image_token``.
        images: folder of pictures.
        texts: folder of ``.txt`` or ``.story`` files; of a story, what precedes the first ``@highlight``.
        num: number of pairs.
        batch_size: pairs a batch.

    Raises:
        ValueError: if ``num`` or ``batch_size`` is below 1, or a folder holds fewer than ``num`` files.
    """
    check_at_least_one(num=num, batch_size=batch_size)
    pictures = _files(images, _IMAGE_SUFFIXES, num, "images")
    stories = _files(texts, _TEXT_SUFFIXES, num, "texts")
    return Probe(_batches(processor, pictures, stories, batch_size))


def _files(folder: Path, suffixes: set[str], num: int, name: str) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{name} must be a folder, got {folder}.")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if len(found) < num:
        raise ValueError(
            f"{name}: {folder} holds {len(found)} files ({', '.join(sorted(suffixes))}), {num} are needed."
        )
    return found[:num]


def _batches(processor: Any, pictures: list[Path], stories: list[Path], batch_size: int) -> Iterator[Batch]:
    from PIL import Image

    for start in range(0, len(pictures), batch_size):
        chosen = slice(start, start + batch_size)
        texts = [path.read_text("utf-8").split("@highlight")[0].strip() for path in stories[chosen]]
        yield processor(
            images=[Image.open(path).convert("RGB") for path in pictures[chosen]],
            text=[f"{processor.image_token}\n{text}" for text in texts],
            padding=True,
            return_tensors="pt",
        )
