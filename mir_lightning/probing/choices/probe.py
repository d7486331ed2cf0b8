"""Multiple-choice items as a model sees them: token ids of prompts and candidates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mir_lightning.functional.checks import check_choice
from mir_lightning.probing.choices.items import IMAGE, ChoiceItem, ImageSource, check_items, open_image
from mir_lightning.probing.choices.styles import STYLES, StyleName
from mir_lightning.probing.probe import batch_digest

T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """Prompt and candidate, tokenised as one text.

    Attributes:
        ids: token ids.
        start: index of the candidate's first token.
    """

    ids: list[int]
    start: int


@dataclass(frozen=True)
class EncodedChoices:
    """A batch of items.

    Attributes:
        inputs: what the processor made of the prompts and their images, padded.
        prompts: token ids of the prompts, without padding.
        candidates: by item; the right answer first.
    """

    inputs: dict[str, Any]
    prompts: list[list[int]]
    candidates: list[list[Candidate]]

    @property
    def rows(self) -> list[Candidate]:
        """The candidates of all items."""
        return [candidate for candidates in self.candidates for candidate in candidates]

    def shared(self) -> list[int]:
        """By item, how many token ids at the start its prompt and all its candidates have in common."""
        return [
            min(common_prefix(prompt, candidate.ids) for candidate in candidates)
            for prompt, candidates in zip(self.prompts, self.candidates, strict=True)
        ]


class ChoiceProbe:
    """Fixed multiple-choice items with the processor that turns them into a model's inputs.

    A candidate follows its prompt after a space, or directly where the prompt ends in white space. Both are
    tokenised as one text, so that a token may span the boundary: it counts as the candidate's.

    Args:
        items: the questions.
        processor: of the model (a Hugging Face processor with a fast or slow ``tokenizer``); called with lists of
            ``text`` and of lists of ``images``.
        template: text around each item's prompt, which replaces ``{prompt}`` in it: for models that expect a
            chat; that of the style when None.
        image_text: what the processor takes for one picture in its text; its ``image_token`` when None, with what
            the style has around it. (Qwen models were trained with
            ``"<|vision_start|><|image_pad|><|vision_end|>"``.)
        open_ended: the items are answered freely, so that they need no distractor.
        style: ask as RADAR's released script for ``"llava"``, ``"qwen"`` or ``"internvl"`` models does (see
            :mod:`~mir_lightning.probing.choices.styles`); repeated candidates are then taken, too. ``"internvl"``
            has the conversation of InternVL 2.5 to 3.5, ``template`` another one.

    Raises:
        TypeError: for items of another kind.
        ValueError: for a template without ``{prompt}``, a processor without tokenizer, pad token or image token,
            or items that cannot be asked (see :func:`~mir_lightning.probing.choices.items.check_items`).
    """

    def __init__(
        self,
        items: Iterable[ChoiceItem],
        processor: Any,
        template: str | None = None,
        image_text: str | None = None,
        open_ended: bool = False,
        style: StyleName | None = None,
    ) -> None:
        if style is not None:
            check_choice("style", style, StyleName)
        self.style = STYLES[style]
        template = self.style.template if template is None else template
        self.items = check_items(items, open_ended, as_released=style is not None)
        if "{prompt}" not in template:
            raise ValueError(f"template must hold {{prompt}}, got {template!r}.")
        if getattr(processor, "tokenizer", None) is None:
            raise ValueError(f"processor must have a tokenizer, got {type(processor).__name__}.")
        if processor.tokenizer.pad_token_id is None:
            raise ValueError("processor.tokenizer has no pad token: set its pad_token, for example to its eos.")
        token = getattr(processor, "image_token", None)
        self.image_text = image_text or (self.style.image_text.replace("{image}", str(token)) if token else "")
        if not self.image_text and any(item.images for item in self.items):
            raise ValueError(f"{type(processor).__name__} has no image_token: say with image_text what it is.")
        self.processor = processor
        self.template = template

    def __len__(self) -> int:
        return len(self.items)

    @property
    def tasks(self) -> dict[str, str]:
        """The ability of each task."""
        return {item.task: item.ability for item in self.items}

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of texts, tasks and pictures: numbers of equal fingerprints are comparable.

        A file counts by name and size; a picture that a callable draws by its item's id.
        """
        digest = hashlib.sha256(self.template.encode())
        for item in self.items:
            texts = (item.id, item.prompt, *item.candidates, item.task, item.ability)
            digest.update("\0".join(texts).encode())
            for source in item.images:
                digest.update(_picture_key(source))
        if self.style is not STYLES[None]:
            digest.update(repr(self.style).encode())
        return digest.hexdigest()

    def encode(self, items: Sequence[ChoiceItem]) -> EncodedChoices:
        """Items of equally many images, for a model; a ``ValueError`` for a candidate without a token."""
        texts = [self._text(item) for item in items]
        images = [[open_image(source) for source in item.images] for item in items]
        inputs = self._process(texts, images)
        prompts = valid_rows(inputs, inputs["input_ids"])
        candidates = []
        for item, prompt, text, pictures in zip(items, prompts, texts, images, strict=True):
            gap = self.style.gap
            if gap is None:
                gap = "" if not text or text[-1].isspace() else " "
            endings = [gap + candidate for candidate in item.candidates]
            found = self._continue(prompt, endings) or self._continue_whole(prompt, text, pictures, endings)
            if self.style.by_count:
                found = [Candidate(row.ids, len(prompt)) for row in found]
            for row, candidate in zip(found, item.candidates, strict=True):
                if row.start >= len(row.ids):
                    raise ValueError(f"items: candidate {candidate!r} of {item.id} adds no token to its prompt.")
            candidates.append(found)
        return EncodedChoices(inputs, prompts, candidates)

    def repeat(self, items: Sequence[ChoiceItem]) -> dict[str, Any]:
        """What the processor makes of the items' prompts, each as often as it has candidates."""
        rows = [item for item in items for _ in item.candidates]
        return self._process([self._text(i) for i in rows], [[open_image(s) for s in i.images] for i in rows])

    def _text(self, item: ChoiceItem) -> str:
        return self.template.replace("{prompt}", self.style.prompt(item)).replace(IMAGE, self.image_text)

    def _process(self, texts: list[str], images: list[list[Any]]) -> dict[str, Any]:
        pictures = {"images": images} if images[0] else {}
        made = dict(self.processor(text=texts, **pictures, padding=True, return_tensors="pt"))
        made.pop("labels", None)
        return made

    def _continue(self, prompt: list[int], endings: Sequence[str]) -> list[Candidate] | None:
        """Tokenise the prompt, its images expanded, with each ending; None if its ids do not survive decoding."""
        tokenizer = self.processor.tokenizer
        text = tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not tokenizer.is_fast or tokenizer(text, add_special_tokens=False)["input_ids"] != prompt:
            return None
        found = []
        for ending in endings:
            tokens = tokenizer(text + ending, add_special_tokens=False, return_offsets_mapping=True)
            ends = [end for _, end in tokens["offset_mapping"]]
            start = next((i for i, end in enumerate(ends) if end > len(text)), len(ends))
            found.append(Candidate(tokens["input_ids"], start))
        return found

    def _continue_whole(
        self, prompt: list[int], text: str, images: list[Any], endings: Sequence[str]
    ) -> list[Candidate]:
        """The same through the processor, images and all; the candidate starts where the ids first differ."""
        found = []
        for ending in endings:
            inputs = self._process([text + ending], [images])
            (ids,) = valid_rows(inputs, inputs["input_ids"])
            found.append(Candidate(ids, common_prefix(prompt, ids)))
        return found


def made_of(kind: type[T], source: T | Callable[[], T]) -> T:
    """``source``, or what it makes if it is a zero-argument callable; a ``TypeError`` for any other kind."""
    made = source() if callable(source) else source
    if not isinstance(made, kind):
        raise TypeError(
            f"items must be a {kind.__name__} or a callable that makes one, got {type(made).__name__}."
        )
    return made


def valid_rows(inputs: dict[str, Any], values: Tensor) -> list[list[int]]:
    """Rows of ``values`` ``[B, S]`` without the padding of ``inputs``."""
    mask = inputs.get("attention_mask", torch.ones_like(values)).bool()
    return [row[valid].tolist() for row, valid in zip(values, mask, strict=True)]


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many ids, or characters, at the start are equal."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _picture_key(source: ImageSource) -> bytes:
    if isinstance(source, (str, Path)):
        return f"{Path(source).name}:{Path(source).stat().st_size}".encode()
    return b"" if callable(source) else batch_digest({"picture": source})
