"""Which samples go into which batch, and what a batch of them is for a model."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Sampler

from mir_lightning.llava.data.packing import pack
from mir_lightning.llava.data.prompts import IMAGE, PlainPrompt, Span, starts_with_bos
from mir_lightning.llava.data.source import Sample
from mir_lightning.probing.choices.probe import common_prefix
from mir_lightning.probing.images import UnreadableImageError

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
    order: Callable[[torch.Generator], torch.Tensor] | None = None  # draws that of an epoch; else any

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
        order = self.order(generator) if self.order else torch.randperm(self.samples, generator=generator)
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
    """Turn samples into a batch for any model whose processor takes lists of texts and of lists of images.

    Every span of a conversation is tokenised by itself, so the boundary between what is learned and what is not is
    one between tokens: ``labels`` are -100 outside what the model says. A sample that cannot be used (nothing of
    it is learned, its text holds a token of pictures, the processor refuses its picture, its pictures are cut off)
    is left out like an unreadable one, and the next takes its place.
    """

    processor: Any  # tokenizer and image processor of the model, with an ``image_token``
    prompt: PlainPrompt  # how a conversation is written
    max_length: int = 2048  # tokens that a sample is cut to
    pack: bool = False  # put several samples into each row of ``max_length`` tokens
    always_pictures: bool = True  # add a blank one, with nothing to learn, to a batch that has none

    def __post_init__(self) -> None:
        self.picture = picture_text(self.processor)
        names = ("image_token", "boi_token", "eoi_token", "video_token")
        self.reserved: set[Any] = {getattr(self.processor, name, None) for name in names} - {None, IMAGE}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask``, ``labels`` ``[B, S]``, pixels, and ``unreadable``, a list.

        Of a mixture also ``source``, a name for each sample; packed, ``position_ids`` ``[B, S]``, and the samples
        in another order.

        Raises:
            UnreadableImageError: if no sample can be used.
        """
        unreadable = [line for sample in samples for line in sample.unreadable]
        try:
            batch = self._batch(samples)
        except Exception:
            usable = []
            for sample in samples:
                try:
                    self._batch([sample])
                    usable.append(sample)
                except Exception as error:
                    unreadable.append(f"{sample.name or 'a sample'}: {error}")
            if not usable:
                raise UnreadableImageError(f"no sample of a batch can be used: {'; '.join(unreadable)}") from None
            batch = self._batch([usable[place % len(usable)] for place in range(len(samples))])
        return {**batch, "unreadable": unreadable}

    def check(self) -> None:
        """Raise a ``ValueError`` where no picture can be learned of, such as a ``max_length`` that holds none."""
        self._batch([Sample((_blank(),), (IMAGE, "A picture."))])

    def _batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        blank = self.always_pictures and not any(sample.images for sample in samples)
        written = [self._spans(sample) for sample in samples] + [[Span(IMAGE, False)]] * blank
        images = [list(sample.images) for sample in samples] + [[_blank()]] * blank
        pixels, expanded = self._process(written, images)
        rows = [self._row(spans, expanded) for spans in written]
        sources = [sample.source for sample in samples] + [""] * blank
        for row in rows[: len(samples)]:
            if not any(label >= 0 for label in row["labels"][1:]):
                raise ValueError(f"max_length={self.max_length} leaves nothing of it to learn.")
        length, by_row = max(len(row["input_ids"]) for row in rows), {key for row in rows for key in row}
        if self.pack:
            if others := sorted({*by_row} - {"input_ids", "attention_mask", "labels"}):
                raise ValueError(f"pack: tokens of this model have {', '.join(others)}: they cannot be packed.")
            length = self.max_length
            rows, order = pack(rows, length)
            pixels = _in_order(pixels, [len(pictures) for pictures in images], order)
            sources = [sources[number] for number in order]
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": -100}
        by_token = {
            key: torch.tensor([[*row.get(key, []), *[fill.get(key, 0)] * length][:length] for row in rows])
            for key in dict.fromkeys(key for row in rows for key in row)
        }
        return {**by_token, **pixels, **({"source": sources} if any(sources) else {})}

    def _spans(self, sample: Sample) -> list[Span]:
        for token in self.reserved:
            if any(token in turn for turn in sample.turns):
                raise ValueError(f"its text holds {token!r}, which stands for pictures.")
        spans = self.prompt(sample.turns, len(sample.images))
        if (places := sum(span.text.count(IMAGE) for span in spans)) != len(sample.images):
            raise ValueError(f"its text has {places} places ({IMAGE}) for its {len(sample.images)} pictures.")
        return spans

    def _process(
        self, written: Sequence[Sequence[Span]], images: Sequence[list[Image.Image]]
    ) -> tuple[dict[str, Any], Iterator[dict[str, list[int]]]]:
        """Pixels as the model takes them, and what each token of the spans with pictures has, by span."""
        texts, shown = [], []
        for spans, pictures in zip(written, images, strict=True):
            left = iter(pictures)
            for span in (span for span in spans if IMAGE in span.text):
                texts.append(span.text.replace(IMAGE, self.picture))
                shown.append([next(left) for _ in range(span.text.count(IMAGE))])
        if not texts:
            return {}, iter(())
        options = {"add_special_tokens": False, "padding": True, "return_tensors": "pt"}
        made = self.processor(images=shown, text=texts, **options)
        valid = made["attention_mask"].bool()
        of_tokens = [key for key, value in made.items() if getattr(value, "shape", None) == valid.shape]
        rows = [{key: made[key][row][valid[row]].tolist() for key in of_tokens} for row in range(len(texts))]
        return {key: value for key, value in made.items() if key not in of_tokens}, iter(rows)

    def _row(self, spans: Sequence[Span], expanded: Iterator[dict[str, list[int]]]) -> dict[str, list[int]]:
        """Token ids and labels of a sample, and what else the processor gives each token: zeros for texts."""
        tokenizer = self.processor.tokenizer
        marked = starts_with_bos(tokenizer) and not self.prompt.writes_its_start
        row: dict[str, list[int]] = {"input_ids": [tokenizer.bos_token_id] * marked, "labels": [-100] * marked}
        pictures = -1  # where the last one ends
        for span in spans:
            shown = IMAGE in span.text
            made = next(expanded) if shown else {}
            ids = made.get("input_ids") or tokenizer(span.text, add_special_tokens=False)["input_ids"]
            before = len(row["input_ids"])
            if shown:
                pictures = before + max(place for place, token in enumerate(ids) if token in self.picture_ids)
            row["labels"] += ids if span.learned else [-100] * len(ids)
            row["input_ids"] += ids
            for key in {*row, *made} - {"labels", "input_ids"}:
                row[key] = row.get(key, [0] * before) + made.get(key, [0] * len(ids))
        if pictures >= self.max_length:
            taken = sum(token in self.picture_ids for token in row["input_ids"])
            raise ValueError(
                f"max_length={self.max_length} would cut a sample inside its pictures, which take {taken} tokens "
                f"and end at token {pictures + 1}: raise it, or leave out what comes before them."
            )
        row["attention_mask"] = [1] * len(row["input_ids"])
        return {key: values[: self.max_length] for key, values in row.items()}

    @cached_property
    def picture_ids(self) -> set[int]:
        """Ids of vision tokens."""
        known = getattr(self.processor, "image_token_id", None)
        return {known if known is not None else self.processor.tokenizer.convert_tokens_to_ids(self.picture)}


def _blank() -> Image.Image:
    return Image.new("RGB", (224, 224))


def _in_order(pixels: dict[str, Any], pictures: Sequence[int], order: Sequence[int]) -> dict[str, Any]:
    """What a processor makes of so many ``pictures`` of each sample, with the samples in another order."""
    starts = [0, *itertools.accumulate(pictures)]
    chosen = [starts[sample] + place for sample in order for place in range(pictures[sample])]
    for key, value in pixels.items():
        if not isinstance(value, torch.Tensor) or len(value) != starts[-1]:
            raise ValueError(
                f"pack: {key} of this model is not one entry a picture: its samples cannot be packed."
            )
    return {key: value[chosen] for key, value in pixels.items()}


def picture_text(processor: Any) -> str:
    """What stands for a picture in a processor's text: what its chat template writes, or its image token."""
    token = processor.image_token
    written = []
    for count in (1, 2):
        content = [{"type": "image"}] * count + [{"type": "text", "text": "?"}]
        try:
            written.append(processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
        except Exception:  # a template is a program, and fails as it likes; many know no pictures
            return token
    start = common_prefix(*written)
    added = written[1][start : start + len(written[1]) - len(written[0])]
    return added.strip() if token in added and added in written[0] else token
