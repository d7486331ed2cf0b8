"""A probe as the MIR paper builds it: image number i, then text number i, unrelated to each other."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mir_lightning.files import read_json, read_json_lines, read_text
from mir_lightning.functional.checks import check_at_least_one
from mir_lightning.probing.images import read_image
from mir_lightning.probing.probe import Batch, Probe, batch_digest, checked_batch
from mir_lightning.vlm import TextPositions, token_masks

T = TypeVar("T")

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
_TEXT_SUFFIXES = {".txt", ".story", ".jsonl"}
_PLAIN_PROMPT = "USER: {image}\n ASSISTANT: {text}"  # a picture at position 0 would be the attention sink
# What the MIR paper's released script feeds: LLaVA's vicuna_v1, the story as the assistant's turn.
PAPER_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: {image}\n ASSISTANT: {text}{eos}"
)


@dataclass(frozen=True)
class Pair:
    """Images, and what follows them: the turns of a conversation, the user's first."""

    images: tuple[Path, ...]
    turns: tuple[str, ...]


def read_pairs(
    images: Path, texts: Path, num: int, seed: int | None = None, image_folder: Path | None = None
) -> list[Pair]:
    """Image number i with text number i, in the order of their names or of the list.

    Args:
        images: folder of pictures, those in its subfolders included; or a list of them: a ``.txt`` file with a
            path a line, or a ``.json`` or ``.jsonl`` file of paths or of objects with ``"image"`` or, as TextVQA's
            questions have it, ``"image_id"`` (below ``"data"``, where the file is an object).
        texts: folder of ``.txt`` files, ``.story`` files (what precedes the first ``@highlight``) and ``.jsonl``
            files (a text, or an object with a ``"text"``, a line); or one such ``.jsonl`` file.
        num: number of pairs.
        seed: draw images and texts at random with it; ``None`` takes the first.
        image_folder: where the paths of a list start; the list's own folder when None.

    Raises:
        ValueError: if a folder is none or holds too few, or if a file or a line is not as it should be.
    """
    check_at_least_one(num=num)
    found = _listed(images, image_folder) if images.is_file() else _files(images, _IMAGE_SUFFIXES, "images")
    chosen = choose(found, num, seed, f"images: {images}")
    sources = [texts] if texts.suffix.lower() == ".jsonl" else _files(texts, _TEXT_SUFFIXES, "texts")
    all_texts = [text for path in sources for text in _texts(path)]
    chosen_texts = choose(all_texts, num, seed, f"texts: {texts}")
    return [Pair((image,), (text,)) for image, text in zip(chosen, chosen_texts, strict=True)]


def _files(folder: Path, suffixes: set[str], name: str) -> list[Path]:
    """What lies in a folder and below it, but for what is hidden."""
    if not folder.is_dir():
        raise ValueError(f"{name} must be a folder, or a file that lists or holds them, got {folder}.")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def _listed(file: Path, folder: Path | None) -> list[Path]:
    """The pictures that a list names."""
    values: list[tuple[str, Any]]
    if file.suffix.lower() == ".jsonl":
        values = [(f"{file}, line {number}", value) for number, value in read_json_lines(file)]
    elif file.suffix.lower() == ".json":
        found = read_json(file)
        found = found.get("data") if isinstance(found, dict) else found
        if not isinstance(found, list):
            raise ValueError(f'images: {file} must hold a list, or an object with one as its "data".')
        values = [(f"{file}, item {number}", value) for number, value in enumerate(found)]
    elif file.suffix.lower() == ".txt":
        lines = enumerate(read_text(file).split("\n"), start=1)
        values = [(f"{file}, line {number}", line.strip()) for number, line in lines if line.strip()]
    else:
        raise ValueError(f"images must be a folder, or a list in a .txt, .json or .jsonl file, got {file}.")
    return [(folder or file.parent) / _named(place, value) for place, value in values]


def _named(place: str, value: Any) -> str:
    name = value
    if isinstance(value, dict):
        number = value.get("image_id")  # TextVQA's pictures are .jpg
        name = value.get("image", f"{number}.jpg" if isinstance(number, (str, int)) else None)
    if not isinstance(name, str) or "\0" in name:
        raise ValueError(f'{place} must be a path, or an object with an "image" or "image_id", got {value!r:.60}.')
    return name


def choose(found: Sequence[T], num: int, seed: int | None, what: str) -> list[T]:
    """The first ``num``, or as many drawn with the seed; a ``ValueError`` that names ``what`` holds fewer."""
    if len(found) < num:
        raise ValueError(f"{what} holds {len(found)}, {num} are needed (num; on the command line --num).")
    return list(found[:num]) if seed is None else random.Random(seed).sample(list(found), num)


def _texts(path: Path) -> list[str]:
    if path.suffix.lower() != ".jsonl":
        return [read_text(path).split("@highlight")[0].strip()]
    texts = []
    for number, value in read_json_lines(path):
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ValueError(f'{path}, line {number} must be a text or an object with a "text".')
        check_characters(f"{path}, line {number}", text)
        texts.append(text.strip())
    return texts


def check_characters(place: str, text: str) -> None:
    r"""Raise a ``ValueError`` for half of a character (``"\ud800"`` in JSON), which no tokenizer takes."""
    if half := re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{place} holds half of a character, the lone surrogate {half[0]!r}.")


def check_prompt(prompt: str | None, processor: Any = None) -> None:
    """Raise a ``ValueError`` unless a format has ``{image}`` once, ``{text}``, and no placeholder of pictures."""
    if prompt is None:
        return
    check_characters("prompt (--prompt)", prompt)
    if prompt.count("{image}") != 1 or "{text}" not in prompt:
        raise ValueError(f"prompt (--prompt) must hold {{image}} once, and {{text}}, got {prompt!r}.")
    token = getattr(processor, "image_token", None)
    if token and str(token) in prompt:
        raise ValueError(f"prompt (--prompt) holds the image placeholder {token!r}, which {{image}} stands for.")


def readable_pairs(pairs: Sequence[Pair]) -> tuple[list[Pair], list[str]]:
    """The pairs all of whose images decode, and for each that does not its path and why."""
    kept, unreadable = [], []
    for pair in pairs:
        try:
            for path in pair.images:
                read_image(path)
            kept.append(pair)
        except ValueError as error:
            unreadable.append(str(error))
    return kept, unreadable


class PairProbe(Probe):
    r"""Pairs as batches of a processor, made when they are asked for: memory does not grow with their number.

    Everything after the last image token is text, role words and end token included, as in the MIR paper's
    script; the processor's marks right behind the image are not.

    Args:
        processor: the model's processor. Its chat template makes the prompt, images before the text.
        config: the model's config.
        pairs: what to show the model.
        batch_size: pairs a batch.
        prompt: format with ``{image}``, ``{text}`` and, where wanted, ``{eos}`` (the tokenizer's end of a text) to
            use instead of a chat template; a processor without one that takes images gets
            ``"USER: {image}\n ASSISTANT: {text}"``.
        text: which positions count as text.
        labels: give the batches ``labels`` as well, for loss and image gain: the text behind the picture, or of a
            conversation what the model says.

    Raises:
        ValueError: if there are no pairs, or ``prompt`` is not such a format; when a batch is made, for an
            unreadable image, a text that holds the image placeholder, or one that cannot be labelled.
    """

    def __init__(
        self,
        processor: Any,
        config: PreTrainedConfig,
        pairs: Sequence[Pair],
        batch_size: int = 4,
        prompt: str | None = None,
        text: TextPositions = "after_vision",
        labels: bool = False,
    ) -> None:
        check_at_least_one(batch_size=batch_size, pairs=len(pairs))
        check_prompt(prompt, processor)
        self.processor = processor
        self.config = config
        self.pairs = [list(pairs[start : start + batch_size]) for start in range(0, len(pairs), batch_size)]
        self.text = text
        self.labels = labels
        self.prompt = prompt if prompt or _writes_images(processor) else _PLAIN_PROMPT
        self._digests = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pairs = self.pairs[index]
        token = str(getattr(self.processor, "image_token", None) or "")
        for pair in pairs:
            if token and any(token in turn for turn in pair.turns):
                raise ValueError(f"the text beside {pair.images[0]} holds the image placeholder {token!r}.")
        images = [[read_image(path) for path in pair.images] for pair in pairs]
        options: dict[str, Any] = {"return_tensors": "pt"}
        if self.prompt:
            flat = [image for each in images for image in each]
            shown = images if any(len(each) > 1 for each in images) else flat
            made = self.processor(images=shown, text=self._prompts(pairs), padding=True, **options)
        else:
            options |= {"tokenize": True, "return_dict": True, "processor_kwargs": {"padding": True}}
            made = self._chat(pairs, images, **options)
        batch = checked_batch(index, {**made})
        batch["text_mask"] = self._text_mask(batch)
        if self.labels:
            batch["labels"] = self._labels(batch, pairs)
        if index not in self._digests:
            self._digests[index] = batch_digest(batch)
        return batch

    def _prompts(self, pairs: Sequence[Pair]) -> list[str]:
        token = getattr(self.processor, "image_token", None)
        prompt, eos = str(self.prompt), self.processor.tokenizer.eos_token
        if "{eos}" in prompt and not eos:
            raise ValueError(
                f"prompt (--prompt, --preset): {{eos}} in {prompt!r}, and the tokenizer has no eos_token."
            )
        prompt = prompt.replace("{eos}", eos or "")
        if token is None:
            raise ValueError(f"{type(self.processor).__name__} has no chat template and no image_token to use.")
        pictures = [str(token) * len(pair.images) for pair in pairs]
        texts = ["\n".join(pair.turns) for pair in pairs]
        return [prompt.replace("{image}", p).replace("{text}", t) for p, t in zip(pictures, texts, strict=True)]

    def _chat(self, pairs: Sequence[Pair], images: Sequence[Sequence[Any]], **options: Any) -> Any:
        conversations = []
        for pair, opened in zip(pairs, images, strict=True):
            content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in opened]
            turns = [("user", [*content, {"type": "text", "text": pair.turns[0]}])]
            for place, turn in enumerate(pair.turns[1:], start=1):
                turns.append((("user", "assistant")[place % 2], [{"type": "text", "text": turn}]))
            conversations.append([{"role": role, "content": said} for role, said in turns])
        answer_follows = all(len(pair.turns) % 2 for pair in pairs)
        return self.processor.apply_chat_template(conversations, add_generation_prompt=answer_follows, **options)

    def _labels(self, batch: Batch, pairs: Sequence[Pair]) -> Tensor:
        """The tokens of the texts, ``[B, S]``, and -100 elsewhere.

        The prompt is written with marks in the places of the texts, and tokenised with the texts there. From the
        first text on it has the batch's tokens: what the processor writes longer are the pictures before it.
        """
        marked = [Pair(pair.images, tuple(turn_marks(len(pair.turns)))) for pair in pairs]
        images = [pair.images for pair in pairs]
        frames = self._prompts(marked) if self.prompt else self._chat(marked, images, tokenize=False)
        labels = torch.full_like(batch["input_ids"], -100)
        valid = batch.get("attention_mask", torch.ones_like(labels))
        vision = token_masks(self.config, batch, self.text).vision
        for row, (pair, frame) in enumerate(zip(pairs, frames, strict=True)):
            marks = turn_marks(len(pair.turns))
            written, *between = re.split("|".join(marks), frame)
            spans = []
            for place, (turn, after) in enumerate(zip(pair.turns, between, strict=False)):
                if place % 2 or len(pair.turns) == 1:
                    spans.append((len(written), len(written) + len(turn)))
                written += turn + after
            plain = self.processor.tokenizer(written, return_offsets_mapping=True)
            learned = [
                token
                for token, (start, end) in enumerate(plain["offset_mapping"])
                if any(start < last and first < end for first, last in spans)
            ]
            tail = plain["input_ids"][learned[0] :] if learned else []
            places = valid[row].nonzero()[:, 0]
            ids, seen = batch["input_ids"][row, places].tolist(), vision[row, places].nonzero()[:, 0].tolist()
            first = range(len(ids) - len(tail), max(seen, default=-1), -1)
            found = next((place for place in first if ids[place : place + len(tail)] == tail), None)
            if found is None or re.findall("|".join(marks), frame) != marks:
                raise ValueError(
                    f"the text beside {pair.images[0]} cannot be labelled, as the prompt does not hold it once, "
                    "as it is and behind the picture; one (--prompt) with {image} before {text} may do."
                )
            chosen = [places[found + token - learned[0]] for token in learned]
            labels[row, chosen] = batch["input_ids"][row, chosen]
        return labels

    def _text_mask(self, batch: Batch) -> Tensor:
        masks = token_masks(self.config, batch, self.text)
        marks = self._added_tokens(batch["input_ids"])
        text = masks.text.clone()
        for row, vision, mark in zip(text, masks.vision, marks, strict=True):
            where = vision.nonzero()[:, 0]
            if len(where):
                first, end = int(where[0]), int(where[-1]) + 1
                while end < len(row) and mark[end]:
                    end += 1
                while first > 0 and mark[first - 1]:
                    first -= 1
                row[first:end] = False
        return text

    def _added_tokens(self, input_ids: Tensor) -> Tensor:
        """Where the processor's special tokens are, but for those that begin, end and pad a text."""
        tokenizer = self.processor.tokenizer
        ordinary = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        added = sorted(set(tokenizer.added_tokens_decoder) - ordinary)
        return torch.isin(input_ids, torch.tensor(added, dtype=input_ids.dtype))


def turn_marks(count: int) -> list[str]:
    """Stand for turns; of a private area of Unicode, which no text uses and no template strips."""
    return [f"\ue123turn {place}\ue124" for place in range(count)]


def _writes_images(processor: Any) -> bool:
    """Whether the chat template knows images; many a processor carries that of its text-only language model."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "text"}]}
    try:
        written = processor.apply_chat_template([message], tokenize=False)
    except Exception:  # a template is a program, and fails as it likes
        return False
    return (getattr(processor, "image_token", None) or "") in written
