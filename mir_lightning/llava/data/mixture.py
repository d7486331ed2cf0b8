"""Several sources in one stream, each with its share: MM1's mixture of captions, documents and plain text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, Dataset, IterableDataset

from mir_lightning.functional.checks import check_choice
from mir_lightning.llava.data.packing import sample_numbers
from mir_lightning.llava.data.source import IndexedSource, Sample, Source

Exhausted = Literal["stop", "repeat", "drop"]
MM1_WEIGHTS = (0.45, 0.45, 0.10)  # captions, interleaved documents, text alone (MM1, section 3.3)


@dataclass(frozen=True)
class Share:
    """A source in a mixture.

    Args:
        name: what it is logged under.
        source: of the samples.
        weight: share of the samples drawn from it.
    """

    name: str
    source: Source
    weight: float | None = None


class Mixture(Source):
    """Samples of several sources by weight, to the sample, in a seeded order anew in every epoch.

    ``datasets.interleave_datasets`` would draw the source of each sample, and with them the length of an epoch,
    which a schedule of learning rates has to know; LitData's combined streams have no samples by index. So the
    order is ours, a function of seed and epoch like that of a single source, and a run goes on in it anywhere.

    Args:
        sources: what is mixed; without weights three sources get MM1's 45, 45 and 10 %, in their order.
        exhausted: what happens when a source has no more samples: ``"stop"`` ends the epoch, ``"repeat"`` begins
            anew with it until all have been seen, ``"drop"`` goes on with the others, by their weights.

    Raises:
        ValueError: for weights that are not above 0 or do not sum to 1, and names that are taken or hold ``"/"``;
            when samples are drawn, for a source that is streamed, has none, or too few for ``data_scale``.
    """

    def __init__(self, sources: list[Share], exhausted: Exhausted = "repeat") -> None:
        check_choice("exhausted", exhausted, Exhausted)
        self.names = [share.name for share in sources]
        if len(set(self.names)) < len(self.names) or any(not name or "/" in name for name in self.names):
            raise ValueError(f'sources: their names must differ and hold no "/", got {self.names}.')
        given = [share.weight for share in sources]
        if given == [None] * len(MM1_WEIGHTS):
            given = list(MM1_WEIGHTS)
        self.weights = [weight or 0.0 for weight in given]
        if not all(weight > 0 for weight in self.weights) or abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(f"sources: their weights must be above 0 and sum to 1, got {given}.")
        self.sources = [share.source for share in sources]
        self.exhausted = exhausted

    def split(self, held_out: int, scale: int | None, seed: int) -> "tuple[Mixed, list[Sample]]":
        """Of each source its share of the held-out samples, and the order of the others."""
        parts, kept = [], []
        for name, source, count in zip(self.names, self.sources, apportion(self.weights, held_out), strict=True):
            if isinstance(source, IndexedSource) and len(source) <= count:
                left = (
                    f"of its {len(source)} samples {count} are held out, none is left" if len(source) else "none"
                )
                raise ValueError(f"source {name!r} has no samples to train on: {left}.")
            training, first = source.split(count, None, seed)
            if isinstance(training, IterableDataset):
                raise ValueError(f"source {name!r} is streamed ({type(source).__name__}): it cannot be mixed.")
            parts.append(training)
            kept.append([replace(first[index], source=name) for index in range(len(first))])
        in_turn = [
            (place / len(part), number, place) for number, part in enumerate(kept) for place in range(len(part))
        ]
        counts = self._counts([len(part) for part in parts], scale)
        return Mixed(parts, self.names, counts, scale is not None), [kept[i][j] for _, i, j in sorted(in_turn)]

    def _counts(self, sizes: Sequence[int], scale: int | None) -> list[list[int]]:
        """Samples of each source in stretches that follow each other; the weights hold in each of them."""
        if self.exhausted == "repeat":
            whole = max(size / weight for size, weight in zip(sizes, self.weights, strict=True))
            return [apportion(self.weights, scale or int(whole))]
        left, stretches, wanted = list(sizes), list[list[int]](), sum(sizes) if scale is None else scale
        while any(left) and wanted:
            weights = [weight * bool(size) for weight, size in zip(self.weights, left, strict=True)]
            longest = min((n + 1) / weight for n, weight in zip(left, weights, strict=True) if weight)
            total = min(int(longest * sum(weights)), wanted)
            while any(count > n for count, n in zip(apportion(weights, total), left, strict=True)):
                total -= 1
            stretches.append(apportion(weights, total))
            left = [n - count for n, count in zip(left, stretches[-1], strict=True)]
            wanted -= total
            if self.exhausted == "stop":
                break
        if scale is not None and wanted:
            have = ", ".join(f"{size} of {name!r}" for name, size in zip(self.names, sizes, strict=True))
            raise ValueError(
                f"data_scale={scale} by weights {self.weights} needs more samples than there are ({have}): "
                "lower it, or set exhausted=repeat."
            )
        return stretches


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in these proportions that sum to ``total``: the largest remainders are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    found = [int(share + 1e-9) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (found[i] - exact[i], i))
    for i in by_remainder[: total - sum(found)]:
        found[i] += 1
    return found


class Mixed(Dataset):
    """Training samples of a mixture, one source behind the other; :meth:`order` mixes them."""

    def __init__(
        self, parts: Sequence[Dataset], names: Sequence[str], counts: Sequence[Sequence[int]], scaled: bool
    ) -> None:
        self.names = names
        self.counts = counts
        totals = [sum(column) for column in zip(*counts, strict=True)]
        sizes: list[int] = [len(part) for part in parts]  # type: ignore[arg-type]
        # With data_scale each epoch is of the same samples.
        self.pools = [min(size, total) if scaled else size for size, total in zip(sizes, totals, strict=True)]
        self.all: ConcatDataset[Sample] = ConcatDataset(parts)
        self.starts = [0, *self.all.cumulative_sizes]

    def __len__(self) -> int:
        """Of an epoch."""
        return sum(map(sum, self.counts))

    def __getitem__(self, index: int) -> Sample:
        sample = self.all[index]
        return replace(sample, source=self.names[sum(index >= start for start in self.starts[1:])])

    def order(self, generator: torch.Generator) -> Tensor:
        """Indices of an epoch, ``[len(self)]``."""
        which = []
        for stretch in self.counts:
            numbers = torch.arange(len(stretch)).repeat_interleave(torch.tensor(stretch))
            which.append(numbers[torch.randperm(len(numbers), generator=generator)])
        of_source = torch.cat(which)
        order = torch.empty_like(of_source)
        for number, pool in enumerate(self.pools):
            places = (of_source == number).nonzero()[:, 0]
            rounds = [torch.randperm(pool, generator=generator) for _ in range(-(-len(places) // pool))]
            order[places] = self.starts[number] + torch.cat([*rounds, places[:0]])[: len(places)]
        return order


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
