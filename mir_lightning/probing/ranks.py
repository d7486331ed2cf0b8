"""Run a probe on all ranks at once, or on one: shares, errors, sums, and batches that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

S = TypeVar("S")
T = TypeVar("T")

_FINE, _OUT_OF_MEMORY, _FAILED = 0, 1, 2


def run_together(
    total: int,
    run: Callable[[int, bool], None],
    distributed: bool,
    device: torch.device,
    progress: str | None = None,
) -> None:
    """Call ``run(index, counts)`` for this rank's share of ``total`` indices, under a bar of that title.

    Every rank gets equally many, because a sharded model computes in step: where the indices do not divide evenly,
    or are fewer than the ranks, some get one that another rank counts. Errors surface when all ranks have run
    theirs, on all of them.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    failure: Exception | None = None
    share = range(rank, -(-total // world) * world, world)
    for index in tqdm(share, desc=progress, leave=False, disable=progress is None):
        try:
            run(index % total, index < total)
        except Exception as error:
            if not distributed:
                raise
            failure = failure or error
    if distributed:
        raise_together(failure, device)


def run_items(
    batches: Sequence[Sequence[int]],
    run: Callable[[Sequence[int]], Sequence[T]],
    distributed: bool,
    device: torch.device,
    progress: str | None = None,
) -> list[T]:
    """What ``run`` gives for each item, by index, of batches of indices that ranks share; on every rank."""
    found: dict[int, T] = {}

    def run_batch(index: int, counts: bool) -> None:
        results = run(batches[index])
        found.update(zip(batches[index], results, strict=True) if counts else ())

    run_together(len(batches), run_batch, distributed, device, progress)
    parts = [found]
    if distributed:
        parts = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, found)
    merged = {index: result for part in parts for index, result in part.items()}
    return [merged[index] for index in sorted(merged)]


def raise_together(error: Exception | None, device: torch.device) -> None:
    """Raise on every rank if any rank has an ``error``; its own on that rank.

    Raises:
        torch.OutOfMemoryError: where running out of memory was the only trouble, so that all can try smaller.
        RuntimeError: on a rank without trouble of its own, or only out of memory, with the other's message.
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
    own = error if outcome == _FAILED else None  # a rank out of memory must not try smaller alone
    causes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(causes, None if own is None else str(own))
    raise own or RuntimeError(
        next(f"on rank {rank}: {cause}" for rank, cause in enumerate(causes) if cause is not None)
    )


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise sums over all ranks."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def fit_into_memory(run: Callable[[S], T], size: S, smaller: Callable[[S], S | None]) -> T:
    """What ``run`` gives for ``size``, or for the first smaller one that fits, else an ``OutOfMemoryError``."""
    while True:
        try:
            return run(size)
        except torch.OutOfMemoryError as error:
            less = smaller(size)
            if less is None:
                raise
            size = less
            error.__traceback__ = None  # it holds the tensors that did not fit
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
