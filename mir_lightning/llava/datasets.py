"""Samples to learn from: LLaVA-format records, Hugging Face datasets, drawn shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from mir_lightning.llava.prompts import IMAGE
from mir_lightning.llava.records import Record, image_path, read_records
from mir_lightning.llava.shapes import Split, draw_sample
from mir_lightning.probing.images import UnreadableImageError, read_image


@dataclass(frozen=True)
class Sample:
    """What a model learns from.

    Attributes:
        images: pictures, RGB.
        turns: of a conversation, the human's first, with ``<image>`` where a picture stands.
        unreadable: what had to be left out to get here, one line each.
    """

    images: tuple[Image.Image, ...]
    turns: tuple[str, ...]
    unreadable: tuple[str, ...] = ()


class ShapesDataset(Dataset):
    """``length`` drawn samples of a split; the same index is always the same sample."""

    def __init__(self, split: Split, length: int, seed: int = 0) -> None:
        self.split = split
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        image, caption = draw_sample(self.split, index, self.seed)
        return Sample((image,), (f"Picture: {IMAGE}", caption))


class RecordsDataset(Dataset):
    """Records of LLaVA-format files.

    Args:
        files: ``.json`` or ``.jsonl`` files.
        image_folder: folder that the paths in them start from.
    """

    def __init__(self, files: Sequence[Path], image_folder: Path) -> None:
        self.records: list[Record] = [record for file in files for record in read_records(file)]
        self.image_folder = image_folder
        for record in self.records:
            for image in record.images:
                image_path(image_folder, image)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        images = tuple(read_image(image_path(self.image_folder, image)) for image in record.images)
        return Sample(images, record.turns)

    def lengths(self) -> list[int]:
        """Characters of each record: near enough to tokens to group by; text-only ones apart."""
        return [sum(map(len, record.turns)) * (1 if record.images else -1) for record in self.records]


class TableDataset(Dataset):
    """A Hugging Face dataset on disk: of ``save_to_disk``, or a folder of parquet files.

    Args:
        folder: where it lies.
        image_column: pictures.
        caption_column: texts.

    Raises:
        ImportError: without the ``datasets`` package.
        ValueError: if the folder or a column is not as it should be.
    """

    def __init__(self, folder: Path, image_column: str, caption_column: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                'data.dataset needs the datasets package: pip install "mir-lightning[data]"'
            ) from error
        parquet = sorted(str(path) for path in folder.glob("**/*.parquet"))
        table = datasets.Dataset.from_parquet(parquet) if parquet else datasets.load_from_disk(str(folder))
        if isinstance(table, datasets.DatasetDict):
            raise ValueError(f"dataset: {folder} holds splits, {', '.join(table)}: give the folder of one.")
        for column in (image_column, caption_column):
            if column not in table.column_names:
                raise ValueError(f"dataset: {folder} has columns {', '.join(table.column_names)}, not {column!r}.")
        self.folder = folder
        self.columns = (image_column, caption_column)
        self.table = table.cast_column(image_column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        row = self.table[index]
        stored, caption = (row[column] for column in self.columns)
        source = BytesIO(stored["bytes"]) if stored["bytes"] is not None else Path(stored["path"])
        return Sample((read_image(source, name=f"{self.folder}, row {index}"),), ("", caption))


class Replacing(Dataset):
    """The next sample in place of one with an unreadable picture, which is noted.

    Raises:
        UnreadableImageError: after ten unreadable samples in a row.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        unreadable: list[str] = []
        for step in range(10):
            try:
                sample: Sample = self.dataset[(index + step) % len(self)]
            except UnreadableImageError as error:
                unreadable.append(str(error))
            else:
                return Sample(sample.images, sample.turns, tuple(unreadable))
        raise UnreadableImageError(f"ten samples in a row cannot be read: {'; '.join(unreadable)}")
