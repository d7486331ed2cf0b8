"""Which samples go into which batch, and what a batch of them is for a model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Sampler

from mir_lightning.llava.data.prompts import IMAGE, PlainPrompt, Span, starts_with_bos
from mir_lightning.llava.data.source import Sample

_GROUP = 50  # batches in which samples are sorted by length


@dataclass
class EpochBatches(Sampler[list[int]]):
    """Batches of one rank, a pure function of seed, epoch and place: an interrupted epoch goes on where it was.

    The order is one of global batches, which the ranks share: any number of ranks sees the same ones.
    """

    lengths: Sequence[int] | int  # of the samples, to batch those of like length; or their number
    batch_size: int  # samples a rank
    seed: int
    position: Callable[[], tuple[int, int]]  # tells the epoch, and how many of its batches are done
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        self.samples = self.lengths if isinstance(self.lengths, int) else len(self.lengths)
        self.global_size = self.batch_size * self.ranks

    def __len__(self) -> int:
        """Batches of a whole epoch, those done included."""
        whole, rest = divmod(self.samples, self.global_size)
        return whole + (rest >= self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, done = self.position()
        for batch in self._global_batches(epoch)[done : len(self)]:
            yield batch[self.rank :: self.ranks]

    def _global_batches(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63)
        order = torch.randperm(self.samples, generator=generator)
        if not isinstance(self.lengths, int):
            groups = torch.arange(len(order)) // (self.global_size * _GROUP)
            by_length = torch.argsort(torch.tensor(self.lengths)[order], stable=True)
            order = order[by_length[torch.argsort(groups[by_length], stable=True)]]
        batches = [batch.tolist() for batch in order.split(self.global_size)]
        if isinstance(self.lengths, int) or len(batches) < 2:
            return batches
        last = [batches.pop()] if len(batches[-1]) < self.global_size else []  # a smaller one stays at the end
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)] + last


@dataclass
class ConversationCollator:
    """Turn samples into a batch for a LLaVA-style model; several pictures a sample, or none.

    Every span of a conversation is tokenised by itself, so the boundary between what is learned and what is not is
    one between tokens: ``labels`` are -100 outside what the model says.
    """

    processor: Any  # tokenizer and image processor of the model, with an ``image_token``
    prompt: PlainPrompt  # how a conversation is written
    max_length: int = 2048  # tokens that a sample is cut to; one cut inside its pictures is refused

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask``, ``labels`` ``[B, S]``, pixels, and ``unreadable``, a list."""
        written = [self.prompt(sample.turns, len(sample.images)) for sample in samples]
        images = [image for sample in samples for image in sample.images]
        pixels, expanded = self._process(images, [text for spans in written for text, _ in spans if IMAGE in text])
        rows = [self._tokens(spans, expanded) for spans in written]
        length = max(len(ids) for ids, _ in rows)
        pad = self.processor.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
            **pixels,
            "unreadable": [line for sample in samples for line in sample.unreadable],
        }

    def _process(self, images: list[Image.Image], texts: list[str]) -> tuple[dict[str, Any], Iterator[list[int]]]:
        """Pixels, and the token ids of each text with its placeholders expanded."""
        if not images:
            return {}, iter(())
        texts = [text.replace(IMAGE, self.processor.image_token) for text in texts]
        made = self.processor(images=images, text=texts, add_special_tokens=False)
        ids = made.pop("input_ids")
        made.pop("attention_mask")
        pixels = {key: torch.stack([torch.as_tensor(v) for v in value]) for key, value in made.items()}
        return pixels, iter(ids)

    def _tokens(self, spans: Sequence[Span], expanded: Iterator[list[int]]) -> tuple[list[int], list[int]]:
        """Token ids and labels of a sample."""
        tokenizer = self.processor.tokenizer
        marked = starts_with_bos(tokenizer) and not self.prompt.writes_its_start
        ids = [tokenizer.bos_token_id] if marked else []
        labels = [-100] * len(ids)
        for text, learned in spans:
            pictures = IMAGE in text
            span = next(expanded) if pictures else tokenizer(text, add_special_tokens=False)["input_ids"]
            if pictures and len(ids) + len(span) > self.max_length:
                raise ValueError(
                    f"max_length={self.max_length} would cut a sample inside its pictures, which take {len(span)} "
                    "tokens: raise it."
                )
            ids += span
            labels += span if learned else [-100] * len(span)
        return ids[: self.max_length], labels[: self.max_length]
