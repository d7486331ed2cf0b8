"""Interleaved documents and plain texts: web pages and books, with pictures where they stand in the text."""

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mir_lightning.files import read_json_lines, regular_file
from mir_lightning.functional.checks import check_at_least_one
from mir_lightning.llava.data.prompts import IMAGE
from mir_lightning.llava.data.records import image_path
from mir_lightning.llava.data.source import IndexedSource, Sample
from mir_lightning.probing.images import UnreadableImageError, read_image

_LAYOUT = (
    'a document is {"images": [...], "texts": [...]}, two lists of one length, at each place a picture or a text '
    'and null in the other, or {"text": "..."}'
)


class Documents(IndexedSource):
    """Documents with pictures between their texts, in OBELICS' layout (arXiv 2306.16527), or texts alone.

    A document is ``{"images": [picture or null, ...], "texts": [text or null, ...]}``, at each place one of the
    two; or ``{"text": "..."}``, without pictures. In ``.jsonl`` files a picture is a path; in ``.parquet`` files a
    path, its bytes, or ``{"bytes", "path"}``, as Hugging Face datasets store it.

    Args:
        files: ``.jsonl`` or ``.parquet`` files, several at once.
        image_folder: folder that paths start from.
        max_images: pictures that a document may have; MM1 trains on up to 16 (section 4).

    Raises:
        ImportError: for ``.parquet`` without the ``datasets`` package.
        ValueError: naming the file and the document that does not fit, or has more pictures.
    """

    def __init__(self, files: Sequence[Path], image_folder: Path = Path(), max_images: int = 16) -> None:
        check_at_least_one(max_images=max_images)
        self.image_folder = image_folder
        self.files = files
        self.tables = [_rows(file) for file in files]
        self.ends = np.cumsum([len(table) for table in self.tables])
        for file, rows in zip(files, self.tables, strict=True):
            for row, count in enumerate(_counts(file, rows)):
                if count > max_images:
                    raise ValueError(
                        f"{_place(file, row)} has {count} pictures, more than max_images={max_images}."
                    )

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> Sample:
        table = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (int(self.ends[table - 1]) if table else 0)
        place = _place(self.files[table], row)
        try:
            parts = document_parts(place, self.tables[table][row])
        except ValueError as error:  # of parquet; those of .jsonl were all read before
            raise UnreadableImageError(str(error)) from error
        pictures = [read_image(self._source(part), place) for kind, part in parts if kind == "image"]
        text = "\n".join(IMAGE if kind == "image" else part for kind, part in parts)
        return Sample(tuple(pictures), (text,), name=place)

    def _source(self, picture: Any) -> Path | BytesIO:
        if isinstance(picture, dict):
            picture = picture["bytes"] if picture.get("bytes") is not None else picture["path"]
        return BytesIO(picture) if isinstance(picture, bytes) else image_path(self.image_folder, picture)


def _place(file: Path, row: int) -> str:
    return f"{file}, document {row}"


def document_parts(place: str, raw: Any) -> list[tuple[str, Any]]:
    """``("image", picture)`` and ``("text", text)`` in their order; a ``ValueError`` that names the place."""
    if not isinstance(raw, dict):
        raise ValueError(f"{place}: {_LAYOUT}; it is {type(raw).__name__}.")
    images, texts = raw.get("images"), raw.get("texts")
    if images is None and texts is None and "text" in raw:
        images, texts = [None], [raw.get("text")]
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise ValueError(f"{place}: {_LAYOUT}; its keys are {', '.join(raw)}.")
    parts: list[tuple[str, Any]] = []
    for image, text in zip(images, texts, strict=True):
        if (image is None) == (text is None) or not isinstance(text, str | None):
            raise ValueError(f"{place}: {_LAYOUT}; at place {len(parts)} it has {image!r:.60} and {text!r:.60}.")
        if text is not None and IMAGE in text:
            raise ValueError(f"{place}: its text holds {IMAGE!r}, which stands for pictures.")
        parts.append(("image", image) if text is None else ("text", text.strip()))
    if not any(kind == "text" and part for kind, part in parts):
        raise ValueError(f"{place} has no text to learn.")
    return parts


def _rows(file: Path) -> Any:
    """The documents of a file, by their number."""
    suffix = regular_file(file).suffix.lower()
    if suffix == ".jsonl":
        return [record for _, record in read_json_lines(file)]
    if suffix != ".parquet":
        raise ValueError(f"{file}: documents are a .jsonl or .parquet file.")
    try:
        import datasets
    except ImportError as error:
        raise ImportError('parquet needs the datasets package: pip install "mir-lightning[data]"') from error
    table = datasets.Dataset.from_parquet(str(file))
    columns = [name for name in ("images", "texts", "text") if name in table.column_names]
    if columns not in (["images", "texts"], ["images", "texts", "text"], ["text"]):
        raise ValueError(f"{file} has columns {', '.join(table.column_names)}: {_LAYOUT}.")
    table = table.select_columns(columns[:2])
    if columns[0] == "images" and isinstance(table.features["images"].feature, datasets.Image):
        table = table.cast_column("images", datasets.List(datasets.Image(decode=False)))
    return table


def _counts(file: Path, rows: Any) -> Iterator[int]:
    """Pictures of each document; those of parquet are counted by what is not null, and not read."""
    if isinstance(rows, list):
        for row, raw in enumerate(rows):
            parts = document_parts(_place(file, row), raw)
            pictures = [part for kind, part in parts if kind == "image"]
            if not all(isinstance(picture, str) and picture for picture in pictures):
                raise ValueError(f"{_place(file, row)}: pictures must be paths, got {pictures!r:.80}.")
            yield len(pictures)
        return
    for chunk in rows.data.column("images").chunks if "images" in rows.features else ():
        valid = chunk.flatten().is_valid().to_numpy(zero_copy_only=False)
        of_row = np.asarray(chunk.value_parent_indices())[valid]
        yield from np.bincount(of_row, minlength=len(chunk)).tolist()
