"""Records in LLaVA's format: a JSON list, or JSON lines, of pictures and conversations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mir_lightning.files import read_json, read_json_lines
from mir_lightning.llava.data.prompts import IMAGE
from mir_lightning.llava.data.source import IndexedSource, Sample
from mir_lightning.probing.images import read_image


class Record(NamedTuple):
    """Paths of pictures in an image folder, and turns, the human's first, with ``<image>`` in them."""

    images: tuple[str, ...]
    turns: tuple[str, ...]
    place: str = ""


class Records(IndexedSource):
    """LLaVA-format files; several pictures a sample or none.

    Args:
        files: ``.json`` or ``.jsonl`` files, several at once.
        image_folder: folder that the paths in them start from.

    Raises:
        ValueError: naming the file and the record that does not fit, or a picture outside the folder.
    """

    def __init__(self, files: Sequence[Path], image_folder: Path) -> None:
        self.records = [record for file in files for record in read_records(file)]
        self.image_folder = image_folder
        for record in self.records:
            for image in record.images:
                image_path(image_folder, image)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        images, turns, place = self.records[index]
        read = tuple(read_image(image_path(self.image_folder, image)) for image in images)
        return Sample(read, turns, name=place)

    def lengths(self) -> list[int]:
        """Characters of each record: near enough to tokens to group by; text-only ones apart."""
        return [sum(map(len, record.turns)) * (1 if record.images else -1) for record in self.records]


def read_records(path: Path) -> list[Record]:
    """Read ``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}``.

    ``image`` is one path, a list of paths, or missing. ``path`` ends in ``.json`` (a list) or ``.jsonl``.

    Raises:
        ValueError: naming the file and the record that does not fit, or where its JSON breaks off.
    """
    suffix = path.suffix.lower()
    if suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: LLaVA data is a .json or .jsonl file.")
    records = read_json(path) if suffix == ".json" else [record for _, record in read_json_lines(path)]
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of records, it holds {type(records).__name__}.")
    return [read_record(f"{path}, record {index}", raw) for index, raw in enumerate(records)]


def read_record(place: str, raw: Any) -> Record:
    """A record from its JSON; a ``ValueError`` that names the place where it stands if it does not fit."""

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
        expected = ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != expected or not isinstance(turn.get("value"), str):
            raise fail(f'turn {number} must be {{"from": "{expected}", "value": text}}, it is {turn!r}.')
    values = [turn["value"].strip() for turn in turns]
    placeholders = sum(value.count(IMAGE) for value in values)
    if placeholders > len(images):
        raise fail(f"{placeholders} {IMAGE} placeholders for {len(images)} images.")
    return Record(tuple(images), tuple(values), place)


def image_path(folder: Path, image: str) -> Path:
    """Where an image of a record lies; a ``ValueError`` if that is outside ``folder``.

    Links inside the folder are followed wherever they lead, but not out of it again by ``..``.
    """
    path = folder / image  # an absolute one stays as it is
    inside = ".." not in Path(image).parts and path.is_relative_to(folder)
    if not inside and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"image {image!r} lies outside the image folder {folder}.")
    return path
