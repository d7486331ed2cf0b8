"""Running mean and covariance in one packed tensor that merges exactly (Chan, Golub and LeVeque, 1983).

Layout, float64: ``[count, mean (d), M2]``, where M2, the centred second moment, is symmetric and kept as its
lower block trapezoids. That is half of the full matrix: about ``4 d²`` bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed
from torch import Tensor

_BLOCK = 256


def _blocks(width: int) -> Iterator[tuple[slice, slice]]:
    """Row slices of M2 of ``[width, width]``, each with its slice of the packed M2."""
    start = 1 + width
    for top in range(0, width, _BLOCK):
        bottom = min(top + _BLOCK, width)
        size = (bottom - top) * bottom
        yield slice(top, bottom), slice(start, start + size)
        start += size


def packed_size(width: int) -> int:
    """Number of float64 values in the packed moments of tokens of ``width``."""
    return 1 + width + sum(packed.stop - packed.start for _, packed in _blocks(width))


def moments_of(rows: Tensor) -> Tensor:
    """Packed moments of tokens ``[n, d]``, n >= 1."""
    rows = rows.double()
    count, width = rows.shape
    packed = rows.new_zeros(packed_size(width))
    packed[0] = count
    packed[1 : 1 + width] = rows.mean(dim=0)
    _add_outer(packed, rows - packed[1 : 1 + width])
    return packed


def merge_moments(first: Tensor, second: Tensor, width: int) -> Tensor:
    """Packed moments of the union of two sets of tokens of ``width``."""
    merged = first + second
    count_first, count_second = first[0], second[0]
    delta = second[1 : 1 + width] - first[1 : 1 + width]
    merged[1 : 1 + width] = first[1 : 1 + width] + delta * (count_second / merged[0])
    _add_outer(merged, (delta * (count_first * count_second / merged[0]).sqrt())[None])
    return merged


def update_moments(packed: Tensor, rows: Tensor) -> None:
    """Add tokens ``[n, d]``, n >= 1, to packed moments, in place."""
    rows = rows.double()
    count, width = rows.shape
    mean = packed[1 : 1 + width]
    row_mean = rows.mean(dim=0)
    delta = row_mean - mean
    total = packed[0] + count
    shift = delta * (packed[0] * count / total).sqrt()
    _add_outer(packed, torch.cat([rows - row_mean, shift[None]]))
    mean += delta * (count / total)
    packed[0] = total


def mean_and_covariance(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean ``[d]`` and covariance ``[d, d]`` (``n - 1`` denominator)."""
    cov = packed.new_empty(width, width)
    for rows, block in _blocks(width):
        cov[rows, : rows.stop] = packed[block].view(-1, rows.stop)
        cov[: rows.start, rows] = cov[rows, : rows.start].T
    return packed[1 : 1 + width].clone(), cov / (packed[0] - 1)


def all_reduce_moments(packed: Tensor, width: int, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """Packed moments of all ranks' tokens; a rank without tokens gives zeros.

    Each rank re-centres its own on the common mean, then they add up: nothing of size ``ranks * d²`` exists.
    """
    sums = torch.cat([packed[:1], packed[0] * packed[1 : 1 + width]])
    torch.distributed.all_reduce(sums, group=group)
    merged = packed.clone()
    merged[1 : 1 + width] = sums[1:] / sums[0]
    shift = packed[1 : 1 + width] - merged[1 : 1 + width]
    _add_outer(merged, (shift * packed[0].sqrt())[None])
    second_moment = merged[1 + width :].contiguous()
    torch.distributed.all_reduce(second_moment, group=group)
    merged[0], merged[1 + width :] = sums[0], second_moment
    return merged


def _add_outer(packed: Tensor, centred: Tensor) -> None:
    """M2 += centredᵀ centred, for centred tokens ``[n, d]``."""
    for rows, block in _blocks(centred.shape[1]):
        packed[block].view(-1, rows.stop).addmm_(centred[:, rows].T, centred[:, : rows.stop])
