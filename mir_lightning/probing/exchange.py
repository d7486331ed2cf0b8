"""A probe whose texts stand beside each other's pictures."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import pad

from mir_lightning.probing.batches import MaskedBatches
from mir_lightning.probing.network import Network, ProbeWarning, map_pixels
from mir_lightning.probing.probe import Batch, Probe, batch_digest
from mir_lightning.vlm import TokenMasks, token_masks


class Exchange:
    """The samples of a probe as they are, and with their texts exchanged.

    Pictures stay where they are, because how rows of pixels belong to samples differs from model to model; the
    texts move: in every batch each row of what is ``[B, S]`` like ``input_ids`` becomes that of the sample that is
    to see the row's picture. So nothing has to be known of a family. Samples exchange only where their runs of
    vision tokens are equally long and the pixels of their batches have equal shapes. Among those the texts go
    round: in a seeded order with samples of one picture side by side, each moves on by as many places as the most
    frequent picture has samples, so that a text meets its own picture only where that is of more than half of
    them.

    Attributes:
        arms: the batches as they are, and exchanged.
        sizes: number of samples in each batch.
        text_of: by picture, the sample whose text is beside it in the exchanged batches, ``[N]``.
        tokens: number of labelled tokens of each sample, ``[N]``.
        paired: whether a sample with picture and labels meets another picture (where all are alike: another
            sample's), bool ``[N]``.
        sources: where each sample is from, if its batch says so.
    """

    def __init__(self, network: Network, probe: Probe, seed: int) -> None:
        assert network.vlm is not None
        batches: list[dict] = []
        self.sources: list[str | None] = []
        for index, batch in enumerate(probe):
            shape = batch["input_ids"].shape
            vision = token_masks(network.vlm.config, batch, "all", network.image_token_id).vision
            labels = batch.get("labels", torch.full(shape, -100))
            for name, value in (("vision_mask", vision), ("labels", labels)):
                if not isinstance(value, Tensor) or value.shape != shape:
                    given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(
                        f"{name} of batch {index} of the probe must have the shape of input_ids, {list(shape)}, "
                        f"got {given}: the image gain exchanges texts by their positions."
                    )
            sources = batch.get("source", [None] * len(labels))
            if len(sources) != len(labels) or ("source" in batch and not all(isinstance(s, str) for s in sources)):
                raise ValueError(
                    f"source of batch {index} of the probe must be a list of {len(labels)} names, got {sources!r}."
                )
            self.sources += sources
            batches.append({**batch, "vision_mask": vision, "labels": labels})
        self.sizes = [len(batch["labels"]) for batch in batches]
        self.tokens = torch.cat([(batch["labels"][:, 1:] != -100).sum(dim=1) for batch in batches])
        pictures = [picture for batch in batches for picture in _pictures(batch)]
        self.text_of = self._derange(batches, pictures, seed)
        exchanged = list(enumerate(self.text_of.tolist()))
        other = [pictures[text] != pictures[place] for place, text in exchanged]
        if not any(other) and any(map(_pixels, batches)) and any(text != place for place, text in exchanged):
            other = [text != place for place, text in exchanged]
            rank_zero_warn(
                "the probe's pictures are all alike, so its image gain is 0. Do pixels arrive as they should?",
                category=ProbeWarning,
            )
        self.paired = torch.zeros(len(pictures), dtype=torch.bool).index_put((self.text_of,), torch.tensor(other))
        self._check_partners()
        masks = [TokenMasks(batch["vision_mask"], batch["vision_mask"]) for batch in batches]
        self.arms = [MaskedBatches(arm, masks) for arm in (batches, self._exchanged(batches))]

    def _derange(self, batches: Sequence[Batch], pictures: Sequence[bytes], seed: int) -> Tensor:
        groups: dict[Hashable, list[int]] = {}
        kinds = [kind for batch in batches for kind in _kinds(batch)]
        self._without = "picture" if all(k is None for k in kinds) else "labelled token beside a picture"
        for sample, (kind, tokens) in enumerate(zip(kinds, self.tokens.tolist(), strict=True)):
            if kind is not None and tokens:
                groups.setdefault(kind, []).append(sample)
        self._candidates = sum(map(len, groups.values()))
        text_of, generator = torch.arange(len(kinds)), torch.Generator().manual_seed(seed)
        for members in groups.values():
            alike: dict[bytes, list[int]] = {}
            for place in torch.randperm(len(members), generator=generator).tolist():
                alike.setdefault(pictures[members[place]], []).append(members[place])
            order = torch.tensor([*itertools.chain(*alike.values())])
            text_of[order.roll(-(max(map(len, alike.values())) % len(order) or 1))] = order
        return text_of

    def _check_partners(self) -> None:
        if not self._candidates:
            raise ValueError(
                f"the probe has no {self._without}: the image gain compares the losses of labelled texts that "
                'have pictures. Give its batches "labels" [B, S] and image placeholders that the model knows.'
            )
        alone = self._candidates - int(self.paired.sum())
        needed = "two different pictures with equally many vision tokens and pixels of one shape"
        if alone == self._candidates:
            raise ValueError(
                f"none of the probe's {alone} labelled samples can see another's picture: the image gain needs "
                f"{needed}. Give the probe more samples, or resize its pictures (the recipe goes without: "
                "--data.gain_samples=0)."
            )
        if alone:
            rank_zero_warn(
                f"{alone} of the probe's {self._candidates} labelled samples with pictures see no other picture "
                f"and are left out of the image gain: an exchange needs {needed}.",
                category=ProbeWarning,
            )

    def _exchanged(self, batches: Sequence[Batch]) -> list[Batch]:
        places = [(batch, row) for batch in batches for row in range(len(batch["labels"]))]
        exchanged: list[Batch] = []
        for batch, texts in zip(batches, self.text_of.split(self.sizes), strict=True):
            sources = [places[text] for text in texts.tolist()]
            length = max(source["labels"].shape[1] for source, _ in sources)
            moved = {}
            for key in _text_keys(batch):
                fill, rows = -100 if key == "labels" else 0, [source[key][..., row, :] for source, row in sources]
                moved[key] = torch.stack([pad(r, (0, length - r.shape[-1]), value=fill) for r in rows], dim=-2)
            exchanged.append({**batch, **moved})
        return exchanged


def _pixels(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    map_pixels(batch, found.append)
    return found


def _text_keys(batch: Batch) -> list[str]:
    """What moves with a text: ``[B, S]`` like ``input_ids``, or ``[any, B, S]`` as positions in space are."""
    pixels, shape = {id(value) for value in _pixels(batch)}, batch["input_ids"].shape
    tensors = [(key, value) for key, value in sorted(batch.items()) if isinstance(value, Tensor)]
    return [k for k, v in tensors if v.ndim in (2, 3) and v.shape[-2:] == shape and id(v) not in pixels]


def _kinds(batch: Batch) -> list[Hashable]:
    """Of each sample, what has to be the same for an exchange; ``None`` without a picture."""
    length = None if "attention_mask" in batch else batch["input_ids"].shape[1]  # padding could not be told apart
    of_batch = (length, *_text_keys(batch), *sorted({value.shape[1:] for value in _pixels(batch)}))
    rows = batch["vision_mask"].tolist()
    runs = [tuple(len(list(run)) for vision, run in itertools.groupby(row) if vision) for row in rows]
    return [(of_run, of_batch) if of_run else None for of_run in runs]


def _pictures(batch: Batch) -> list[bytes]:
    """A digest of each sample's pixels, where their rows can be told; else no two are known to be the same.

    There is a row a sample, or as many rows as is the sample's share of the batch's vision tokens.
    """
    tokens = batch["vision_mask"].sum(dim=1)
    shares = [0, *tokens.cumsum(dim=0).tolist()]
    digests: list[dict[str, Tensor]] = [{} for _ in tokens]
    for number, value in enumerate(_pixels(batch)):
        ends = [len(value) * share / max(1, shares[-1]) for share in shares]
        if len(value) == len(tokens) and bool(tokens.all()):
            ends = [float(row) for row in range(len(tokens) + 1)]
        known = all(end.is_integer() for end in ends)
        for row, (start, end) in enumerate(itertools.pairwise(ends)):
            digests[row][str(number)] = value[int(start) : int(end)] if known else torch.tensor([id(batch), row])
    return [batch_digest(digest) for digest in digests]
