"""Several samples in one row, for less padding: attention keeps them apart by their positions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Row = dict[str, list[int]]


def pack(rows: Sequence[Row], length: int) -> tuple[list[Row], list[int]]:
    """Put samples into rows of at most ``length`` tokens: the longest first, each into the first row with room.

    ``position_ids`` count anew in each sample, by which transformers builds a mask that keeps samples apart. The
    first token of a sample has no label, as nothing comes before it.

    Returns:
        The rows, and the samples' numbers in the order in which they lie in them.
    """
    packed: list[Row] = []
    contents: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"])):
        row = {**rows[number], "position_ids": list(range(len(rows[number]["input_ids"])))}
        row["labels"] = [-100, *row["labels"][1:]]
        room = (
            place
            for place, taken in enumerate(packed)
            if len(taken["input_ids"]) + len(row["input_ids"]) <= length
        )
        if (place := next(room, None)) is None:
            packed.append({key: list(values) for key, values in row.items()})
            contents.append([number])
            continue
        for key, values in row.items():
            packed[place][key] += values
        contents[place].append(number)
    return packed, [number for row in contents for number in row]


def samples_of(batch: Mapping[str, Any]) -> int:
    """How many samples are in a training batch, packed or not."""
    packed = "position_ids" in batch
    return int(_starts(batch).sum()) if packed else len(batch["input_ids"])


def sample_numbers(batch: Mapping[str, Any]) -> Tensor:
    """Which sample of a batch each position belongs to, ``[B, S]``, in order of the samples; -1 for padding."""
    shape, valid = batch["input_ids"].shape, batch["attention_mask"].bool()
    if "position_ids" not in batch:
        numbers = torch.arange(shape[0], device=valid.device)[:, None].expand(shape)
    else:
        numbers = _starts(batch).flatten().cumsum(0).view(shape) - 1
    return numbers.where(valid, -1)


def _starts(batch: Mapping[str, Any]) -> Tensor:
    """Where the samples of a packed batch begin, bool ``[B, S]``."""
    return (batch["position_ids"] == 0) & batch["attention_mask"].bool()
