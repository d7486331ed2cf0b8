"""Several samples in one row, for less padding: attention keeps them apart by their positions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

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


def source_losses(batch: Mapping[str, Any], logits: Tensor, names: Sequence[str]) -> Tensor:
    """Cross-entropy of a batch's labelled tokens by source: sum and number, float64 ``[len(names), 2]``.

    ``logits`` ``[B, S', V]`` are those of the last ``S'`` positions.
    """
    targets, samples = batch["labels"][:, 1:], sample_numbers(batch)[:, 1:]
    targets, samples = (tensor[:, tensor.shape[1] + 1 - logits.shape[1] :] for tensor in (targets, samples))
    learned = targets != -100
    losses = cross_entropy(logits[:, :-1][learned].float(), targets[learned], reduction="none")
    of_sample = [names.index(name) if name in names else len(names) for name in batch["source"]]
    of_token = torch.tensor(of_sample, device=losses.device)[samples[learned]]
    found = torch.zeros(len(names) + 1, 2, dtype=torch.float64, device=losses.device)
    found.index_add_(0, of_token, torch.stack([losses, torch.ones_like(losses)], dim=1).double())
    return found[:-1]


def samples_of(batch: Mapping[str, Any]) -> int:
    """How many samples are in a training batch, packed or not."""
    return int(sample_numbers(batch).max()) + 1


def sample_numbers(batch: Mapping[str, Any]) -> Tensor:
    """Which sample of a batch each position belongs to, ``[B, S]``, in order of the samples; -1 for padding."""
    shape, valid = batch["input_ids"].shape, batch["attention_mask"].bool()
    if "position_ids" not in batch:
        numbers = torch.arange(shape[0], device=valid.device)[:, None].expand(shape)
    else:
        numbers = ((batch["position_ids"] == 0) & valid).flatten().cumsum(0).view(shape) - 1
    return numbers.where(valid, -1)
