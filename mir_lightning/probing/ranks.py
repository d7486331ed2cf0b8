"""Share a probe over the ranks of a process group, and agree on how it went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

T = TypeVar("T")

_FINE, _OUT_OF_MEMORY, _FAILED = 0, 1, 2


def share_of_rank(items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    """This rank's items, each with whether it counts.

    Every rank gets equally many, because a sharded model computes in step: where the items do not divide
    evenly, or are fewer than the ranks, some get an item that another rank counts.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    indices = range(rank, rounds_of(items) * world, world)
    return ((items[i % len(items)], i < len(items)) for i in indices)


def rounds_of(items: Sequence[T]) -> int:
    """How many items each rank runs."""
    return -(-len(items) // dist.get_world_size())


def progress_bar(items: Iterable[T], total: int, title: str | None) -> Iterable[T]:
    """The items, with a bar under that title that disappears at the end; none without a title."""
    return tqdm(items, total=total, desc=title, leave=False, disable=title is None)


def run_items(
    batches: Sequence[Sequence[int]],
    run: Callable[[Sequence[int]], Sequence[T]],
    distributed: bool,
    device: torch.device,
    progress: str | None = None,
) -> list[T]:
    """What ``run`` gives for each item, by index, of batches of indices that ranks may share.

    With a title in ``progress`` a bar is shown. Distributed, every rank gets all of it; errors surface when all
    ranks have run theirs, on all of them.
    """
    found: dict[int, T] = {}
    failure: Exception | None = None
    share = share_of_rank(batches) if distributed else ((b, True) for b in batches)
    for batch, counts in progress_bar(share, rounds_of(batches) if distributed else len(batches), progress):
        try:
            results = run(batch)
        except Exception as error:
            if not distributed:
                raise
            failure = failure or error
        else:
            found |= dict(zip(batch, results, strict=True)) if counts else {}
    if distributed:
        raise_together(failure, device)
        parts: list[dict[int, T]] = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, found)
        found = {index: result for part in parts for index, result in part.items()}
    return [found[index] for index in sorted(found)]


def raise_together(error: Exception | None, device: torch.device) -> None:
    """Raise on every rank if any rank has an ``error``; its own on that rank.

    Raises:
        torch.OutOfMemoryError: where running out of memory was the only trouble, so that all can try smaller.
        RuntimeError: on a rank without trouble of its own, with the other's message.
    """
    outcome = _FINE if error is None else _FAILED
    if isinstance(error, torch.OutOfMemoryError):
        outcome = _OUT_OF_MEMORY
    worst = torch.tensor(outcome, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if worst == _FINE:
        return
    if worst == _OUT_OF_MEMORY:
        raise error or torch.OutOfMemoryError("another rank ran out of memory in the probe.")
    causes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(causes, None if error is None else str(error))
    raise error or RuntimeError(next(f"on rank {rank}: {cause}" for rank, cause in enumerate(causes) if cause))


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise sums over all ranks."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()
