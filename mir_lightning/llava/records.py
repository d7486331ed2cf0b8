"""Records in LLaVA's format: a JSON list, or JSON lines, of pictures and conversations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mir_lightning.llava.prompts import IMAGE

_SPEAKERS = ("human", "gpt")


@dataclass(frozen=True)
class Record:
    """One sample.

    Attributes:
        name: its ``id``, or its place in the file.
        images: paths as the file gives them, relative to an image folder; empty for a text-only sample.
        turns: what is said, the human first, then by turns, with ``<image>`` where a picture stands.
    """

    name: str
    images: tuple[str, ...]
    turns: tuple[str, ...]


def read_records(path: Path) -> list[Record]:
    """Read ``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}``.

    ``image`` is one path, a list of paths, or missing. ``path`` ends in ``.json`` (a list) or ``.jsonl``.

    Raises:
        ValueError: naming the file and the record that does not fit, or where its JSON breaks off.
    """
    return [
        read_record(f"{path}, record {index}", raw, str(index)) for index, raw in enumerate(_raw_records(path))
    ]


def _raw_records(path: Path) -> Iterator[Any]:
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: LLaVA data is a .json or .jsonl file.")
    text = path.read_text("utf-8-sig")
    if path.suffix == ".json":
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from error
        if not isinstance(records, list):
            raise ValueError(f"{path} must hold a list of records, it holds {type(records).__name__}.")
        yield from records
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error


def read_record(place: str, raw: Any, name: str = "") -> Record:
    """A record from its JSON.

    Args:
        place: where it stands, for errors.
        raw: the record.
        name: of one without ``id``.

    Raises:
        ValueError: if it does not fit.
    """

    def fail(message: str) -> ValueError:
        named = f" (id {raw['id']!r})" if isinstance(raw, dict) and "id" in raw else ""
        return ValueError(f"{place}{named}: {message}")

    if not isinstance(raw, dict):
        raise fail(f"must be an object, it is {type(raw).__name__}.")
    images = raw.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise fail(f'"image" must be a path or a list of paths, it is {raw["image"]!r}.')
    turns = raw.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise fail('"conversations" must be a list of turns.')
    for number, turn in enumerate(turns):
        expected = _SPEAKERS[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != expected or not isinstance(turn.get("value"), str):
            raise fail(f'turn {number} must be {{"from": "{expected}", "value": text}}, it is {turn!r}.')
    values = [turn["value"] for turn in turns]
    placeholders = sum(value.count(IMAGE) for value in values)
    if placeholders > len(images):
        raise fail(f"{placeholders} {IMAGE} placeholders for {len(images)} images.")
    return Record(str(raw.get("id", name)), tuple(images), tuple(value.strip() for value in values))


def image_path(folder: Path, image: str) -> Path:
    """Where an image of a record lies; a ``ValueError`` if that is outside ``folder``."""
    if Path(image).is_absolute() or os.path.normpath(image).startswith(".."):
        raise ValueError(f"image {image!r} lies outside the image folder {folder}.")
    return folder / image
