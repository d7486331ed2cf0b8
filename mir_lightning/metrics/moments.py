"""Running mean and covariance that merge exactly (Chan, Golub and LeVeque, 1983)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mir_lightning.functional.frechet import full_float32

_BLOCK = 192
_SHORT = 256  # tokens of a product in float32: its rounding is that of so few terms


class Moments(NamedTuple):
    """Count, mean and centred second moment M2 of tokens of width d.

    M2 is symmetric: its lower block trapezoids are kept, one after another, about ``d² / 2`` values.
    """

    head: Tensor  # [1 + d], float64: the count, then the mean
    second: Tensor  # float64 or float32

    @property
    def total(self) -> Tensor:
        """Number of tokens, a scalar."""
        return self.head[0]

    @property
    def mean(self) -> Tensor:
        """``[d]``; a view."""
        return self.head[1:]


def _blocks(width: int) -> Iterator[tuple[slice, slice]]:
    """Row slices of M2 of ``[width, width]``, each with its slice of the packed M2."""
    start = 0
    for top in range(0, width, _BLOCK):
        bottom = min(top + _BLOCK, width)
        size = (bottom - top) * bottom
        yield slice(top, bottom), slice(start, start + size)
        start += size


def packed_size(width: int) -> int:
    """Number of values in the packed M2 of tokens of ``width``."""
    return sum(packed.stop - packed.start for _, packed in _blocks(width))


def no_moments(width: int, dtype: torch.dtype, device: torch.device) -> Moments:
    """Moments of no token."""
    head = torch.zeros(1 + width, dtype=torch.float64, device=device)
    return Moments(head, torch.zeros(packed_size(width), dtype=dtype, device=device))


def moments_of(rows: Tensor, dtype: torch.dtype = torch.float64, products: torch.dtype = torch.float64) -> Moments:
    """Moments of tokens ``[n, d]``, n >= 1, with M2 in ``dtype``."""
    moments = no_moments(rows.shape[1], dtype, rows.device)
    update_moments(moments, rows, products)
    return moments


def update_moments(moments: Moments, rows: Tensor, products: torch.dtype = torch.float64) -> None:
    """Add tokens ``[n, d]``, n >= 1, to moments, in place.

    Tokens are centred before M2 sees them, so nothing cancels in it, whatever its precision or its ``products``'.
    """
    count = len(rows)
    centred = torch.empty(count + 1, rows.shape[1], dtype=torch.float64, device=rows.device)
    centred[:count] = rows
    row_mean = centred[:count].mean(dim=0)
    centred[:count] -= row_mean
    delta = row_mean - moments.mean
    total = moments.total + count
    centred[count] = delta * (moments.total * count / total).sqrt()
    _add_outer(moments.second, centred, products)
    moments.mean.add_(delta * (count / total))
    moments.total.copy_(total)


def merge_moments(first: Moments, second: Moments) -> Moments:
    """Moments of the union of two sets of tokens; neither argument changes."""
    delta = second.mean - first.mean
    total = first.total + second.total
    merged = Moments(first.head.clone(), first.second + second.second)
    _add_outer(merged.second, (delta * (first.total * second.total / total).sqrt())[None])
    merged.mean.add_(delta * (second.total / total))
    merged.total.copy_(total)
    return merged


def mean_and_covariance(moments: Moments) -> tuple[Tensor, Tensor]:
    """Mean ``[d]`` and covariance ``[d, d]`` (``n - 1`` denominator), float64."""
    width = len(moments.mean)
    cov = moments.head.new_empty(width, width)
    for rows, block in _blocks(width):
        cov[rows, : rows.stop] = moments.second[block].view(-1, rows.stop)
        cov[: rows.start, rows] = cov[rows, : rows.start].T
    return moments.mean.clone(), cov.div_(moments.total - 1)


def reduce_moments(moments: Moments, owner: int | None, group: dist.ProcessGroup | None) -> Moments:
    """Moments of all ranks' tokens; a rank without tokens gives :func:`no_moments`.

    Each rank re-centres its own on the common mean, then they add up: nothing of size ``ranks * d²`` exists. Where
    one rank of the group is the ``owner``, M2 is empty on the others.
    """
    sums = torch.cat([moments.total[None], moments.total * moments.mean])
    dist.all_reduce(sums, group=group)
    head = torch.cat([sums[:1], sums[1:] / sums[0]])
    second = moments.second.clone()
    _add_outer(second, ((moments.mean - head[1:]) * moments.total.sqrt())[None])
    if owner is None:
        dist.all_reduce(second, group=group)
    else:
        dist.reduce(second, owner if group is None else dist.get_global_rank(group, owner), group=group)
    return Moments(head, second if owner in (None, dist.get_rank(group)) else second[:0])


def _add_outer(second: Tensor, centred: Tensor, products: torch.dtype = torch.float64) -> None:
    """M2 += centredᵀ centred, for centred float64 tokens ``[n, d]``; float32 products are of few tokens each."""
    with full_float32(centred.device):
        for tokens in centred.to(products).split(len(centred) if products == torch.float64 else _SHORT):
            for rows, block in _blocks(centred.shape[1]):
                total = second[block].view(-1, rows.stop)
                if total.dtype == products:
                    total.addmm_(tokens[:, rows].T, tokens[:, : rows.stop])
                else:
                    total += tokens[:, rows].T @ tokens[:, : rows.stop]
