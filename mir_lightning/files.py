"""Files read and written on every floor, with errors that say where in a file something is wrong."""

import csv
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

LARGEST = 1e300  # of larger numbers sums and pictures overflow

_PLAIN = {
    str: ("a text", lambda value: isinstance(value, str)),
    int: ("a whole number", lambda value: type(value) is int),
    float: (f"a number within {LARGEST:g}", lambda value: type(value) in (int, float) and abs(value) <= LARGEST),
}


def regular_file(path: str | Path) -> Path:
    """The path of a regular file; a ``ValueError`` for a folder, or a pipe, which would be waited for forever."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError(f"{path} must be a regular file.")
    return Path(path)


def read_text(path: str | Path) -> str:
    """A text file, UTF-8 with or without a byte order mark; a ``ValueError`` names one that is not."""
    try:
        return regular_file(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}.") from error


def read_json(path: str | Path) -> Any:
    """The value in a JSON file, UTF-8 with or without a byte order mark; a ``ValueError`` names the file."""
    return _value(regular_file(path).read_bytes(), str(path))


def read_json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and value of each line that is not blank; a ``ValueError`` names file and line.

    Lines end at line feeds only: JSON texts may hold Unicode's other line separators as they are.
    """
    with regular_file(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _value(line, f"{path}, line {number}")


def _value(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}.") from error


def read_csv(path: str | Path) -> list[dict[str, str | None]]:
    """Rows of a CSV file by the names in its first line; a ``ValueError`` names a file that is none."""
    try:
        with regular_file(path).open(newline="", encoding="utf-8-sig") as opened:
            return list(csv.DictReader(opened))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV file: {error}.") from error


def finite_number(value: Any) -> float | None:
    """The number that a value is or is written as, if it is one within 1e300."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None  # nor is NaN


def check_json(place: str, value: Any, schema: Any, field: str = "it") -> None:
    """Raise a ``ValueError`` that begins with ``place`` and names the first field that does not fit.

    A schema is ``str``, ``int`` or ``float`` (within 1e300); for a list ``[schema]``, or a schema for each of its
    items; for an object a dict of the fields that it needs.
    """
    if isinstance(schema, dict):
        wanted, fits = "an object", isinstance(value, dict)
    elif isinstance(schema, list):
        wanted = f"a list of {'one or more' if len(schema) == 1 else len(schema)}"
        fits = isinstance(value, list) and len(value) > 0 and len(schema) in (1, len(value))
    else:
        wanted, fits = _PLAIN[schema][0], _PLAIN[schema][1](value)
    if not fits:
        raise ValueError(f"{place}: {field} must be {wanted}, got {value!r:.60}.")
    if isinstance(schema, dict):
        for key, kind in schema.items():
            check_json(place, value.get(key), kind, key if field == "it" else f"{field}.{key}")
    elif isinstance(schema, list):
        for index, item in enumerate(value):
            check_json(place, item, schema[index % len(schema)], f"{field}[{index}]")


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Safetensors' ``save_file``, which writes for its user alone (mode 0600), with the mode of any new file."""
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)
