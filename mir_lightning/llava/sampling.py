"""Which samples go into which batch: shuffled, grouped by length, shared over ranks, resumable anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

_GROUP = 50  # batches in which samples are sorted by length


class EpochBatches(Sampler[list[int]]):
    """Batches of one rank, a pure function of seed, epoch and place: an interrupted epoch goes on where it was.

    The order is one of global batches, which the ranks share: any number of ranks sees the same ones.

    Args:
        lengths: of the samples; of like length are put into a batch. Or their number, to shuffle only.
        batch_size: samples a rank and batch.
        seed: of the order.
        position: tells the epoch, and how many of its batches are done.
        rank: of this process.
        ranks: their number.
    """

    def __init__(
        self,
        lengths: Sequence[int] | int,
        batch_size: int,
        seed: int,
        position: Callable[[], tuple[int, int]],
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.position = position
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        """Batches of a whole epoch, those done included."""
        whole, rest = divmod(self._samples, self.batch_size * self.ranks)
        return whole + (rest >= self.ranks)

    @property
    def _samples(self) -> int:
        return self.lengths if isinstance(self.lengths, int) else len(self.lengths)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, done = self.position()
        for batch in self._global_batches(epoch)[done : len(self)]:
            yield batch[self.rank :: self.ranks]

    def _global_batches(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63)
        order = torch.randperm(self._samples, generator=generator)
        size = self.batch_size * self.ranks
        if not isinstance(self.lengths, int):
            lengths = torch.tensor(self.lengths)[order]
            groups = torch.arange(len(order)) // (size * _GROUP)
            by_length = torch.argsort(lengths, stable=True)
            order = order[by_length[torch.argsort(groups[by_length], stable=True)]]
        batches = [order[start : start + size].tolist() for start in range(0, len(order), size)]
        if isinstance(self.lengths, int) or len(batches) < 2:
            return batches
        last = batches.pop() if len(batches[-1]) < size else None  # a smaller one stays at the end
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        return [*shuffled, last] if last else shuffled
