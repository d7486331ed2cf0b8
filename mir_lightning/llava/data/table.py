"""A table of pictures and captions: a Hugging Face dataset on disk."""

from io import BytesIO
from pathlib import Path

from mir_lightning.llava.data.source import IndexedSource, Sample
from mir_lightning.probing.images import UnreadableImageError, read_image


class Table(IndexedSource):
    """A Hugging Face dataset on disk: of ``save_to_disk``, or a folder of parquet files.

    Args:
        folder: where it lies.
        image_column: pictures.
        caption_column: texts.

    Raises:
        ImportError: without the ``datasets`` package.
        ValueError: if the folder or a column is not as it should be.
    """

    def __init__(self, folder: Path, image_column: str = "image", caption_column: str = "caption") -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError('a Table needs the datasets package: pip install "mir-lightning[data]"') from error
        parquet = sorted(str(path) for path in folder.glob("**/*.parquet"))
        table = datasets.Dataset.from_parquet(parquet) if parquet else datasets.load_from_disk(str(folder))
        if isinstance(table, datasets.DatasetDict):
            raise ValueError(f"dataset {folder} holds splits, {', '.join(table)}: give the folder of one.")
        for column in (image_column, caption_column):
            if column not in table.column_names:
                raise ValueError(f"dataset {folder} has columns {', '.join(table.column_names)}, not {column!r}.")
        texts = table.features[caption_column]
        if getattr(texts, "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"dataset {folder}: column {caption_column!r} holds {texts}, not one text a row.")
        pictures = table.features[image_column]
        if not isinstance(pictures, datasets.Image) and "bytes" not in getattr(pictures, "keys", tuple)():
            raise ValueError(f"dataset {folder}: column {image_column!r} holds {pictures}, not one picture a row.")
        self.folder = folder
        self.columns = (image_column, caption_column)
        self.table = table.cast_column(image_column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        row, name = self.table[index], f"{self.folder}, row {index}"
        stored, caption = (row[column] for column in self.columns)
        for column, value in zip(self.columns, (stored, caption), strict=True):
            if value is None:
                raise UnreadableImageError(f"{name}: {column} is empty")
        source = BytesIO(stored["bytes"]) if stored["bytes"] is not None else Path(stored["path"])
        return Sample((read_image(source, name=name),), ("", caption), name=name)
