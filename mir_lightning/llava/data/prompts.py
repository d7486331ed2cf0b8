"""How a conversation is written for a model, and which parts of it the model learns to say."""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from mir_lightning.probing.choices.items import IMAGE  # where a picture stands, whatever a model's own mark is
from mir_lightning.probing.choices.probe import common_prefix
from mir_lightning.probing.pairs import turn_marks


class Span(NamedTuple):
    """A part of what is written: all of it is learned, or nothing."""

    text: str  # IMAGE where a picture stands
    learned: bool


class PlainPrompt:
    """LLaVA's pre-training format: the pictures, what the model says, a line break; nothing else.

    The human's turns are left out (LLaVA-1.5, ``plain``). A text of a single turn is learned whole; its pictures
    stay where they are in it.

    ``start`` comes first: :func:`missing_start` of a tokenizer. A first token that is no picture keeps the
    attention sink out of the vision tokens.
    """

    writes_its_start = False  # with the token that begins a sequence, where a tokenizer adds one

    def __init__(self, start: str = "") -> None:
        self.start = start

    def __call__(self, turns: Sequence[str], images: int) -> list[Span]:
        """Spans of a conversation with so many pictures."""
        if len(turns) == 1:
            text = f"{IMAGE * (images - turns[0].count(IMAGE))}{turns[0].strip()}\n"
            return [*self._first(0), *_apart(text, learned=True)]
        said = turns[1::2]
        text = "\n".join(turn.replace(IMAGE, "").strip() for turn in said)
        return [*self._first(images), Span(f"{text}\n", True)]

    def _first(self, images: int) -> list[Span]:
        return [Span(self.start + IMAGE * images, False)] if self.start or images else []

    def question(self, text: str) -> str:
        """A user's turn, up to where the model's answer begins, for a tokenizer that marks the start by itself."""
        return self.start + text


class ChatPrompt(PlainPrompt):
    """A chat template; what is learned is exactly the model's turns, with the marks that end them.

    The template is written once with the turns and once with marks in their places, so that it may write a turn
    differently by what follows it. One that changes what is said (a template is a program) raises a
    ``ValueError``; so does a tokenizer without any, or a template that writes nothing of what is said.

    A ``system`` text comes first, for templates that know one. A first token that is no picture keeps the
    attention sink out of the vision tokens. ``template``: where it is not the tokenizer's, but its processor's.
    """

    writes_its_start = True

    def __init__(self, tokenizer: Any, system: str | None = None, template: str | None = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.system = system
        self.template = template or tokenizer.chat_template
        if self.template is None:
            raise ValueError(
                f'prompt "chat": {type(tokenizer).__name__} has no chat template: give one, or use "plain".'
            )
        mark = turn_marks(1)
        self._takes_parts = False
        if mark[0] not in self._write(mark, False):
            self._takes_parts = True  # {"type": "text", "text": ...} and no plain texts
            if mark[0] not in self._write(mark, False):
                raise ValueError(f'prompt "chat": the chat template of {type(tokenizer).__name__} writes no turn.')

    def __call__(self, turns: Sequence[str], images: int) -> list[Span]:
        """Spans of a conversation with so many pictures; those without a place come first."""
        first = f"{IMAGE}\n" * (images - sum(turn.count(IMAGE) for turn in turns)) + turns[0]
        said, marks = [first, *turns[1:]], turn_marks(len(turns))
        frame = self._between(marks, self._write(marks, False))
        whole = self._write(said, False)
        for texts in (said, [text.strip() for text in said]):
            if whole == frame[0] + "".join(text + after for text, after in zip(texts, frame[1:], strict=True)):
                break
        else:
            raise ValueError("the chat template changes what is said in this conversation.")
        if len(texts) == 1:
            return _apart(whole, learned=True)
        spans = [Span(frame[0], False)]
        for place, text in enumerate(texts):
            after = frame[place + 1]
            if place % 2 == 0:  # a question; the blanks before an answer belong to it
                asked = self._between(marks[: place + 1], self._write(marks[: place + 1], True))[-1]
                blank = after[len(asked) :] if after.startswith(asked) and not after[len(asked) :].strip() else ""
                spans += [Span(text + after.removesuffix(blank), False), Span(blank, True)]
                continue
            last = place + 1 == len(texts)
            alone = self._between(marks[: place + 1], self._write(marks[: place + 1], False))[-1]
            end = after if last else after[: common_prefix(after, alone)]
            spans += [*_apart(text + end, learned=True), Span(after[len(end) :], False)]
        # Neighbours that are learned, or are not, as one: they are tokenised together.
        runs = itertools.groupby((span for span in spans if span.text), key=lambda span: span.learned)
        return [Span("".join(span.text for span in run), learned) for learned, run in runs]

    def question(self, text: str) -> str:
        """A user's turn, up to where the model's answer begins."""
        written = self._write([text], True)
        return written.removeprefix(self.tokenizer.bos_token) if starts_with_bos(self.tokenizer) else written

    def _write(self, turns: Sequence[str], answer_follows: bool) -> str:
        roles, texts = ["user", "assistant"] * len(turns), turns
        if self.system is not None:
            roles, texts = ["system", *roles], [self.system, *turns]
        parts = [[{"type": "text", "text": text}] if self._takes_parts else text for text in texts]
        messages = [{"role": role, "content": part} for role, part in zip(roles, parts, strict=False)]
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=answer_follows
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def _between(self, marks: Sequence[str], written: str) -> list[str]:
        """What is written before, between and after the marks."""
        pieces = re.split("|".join(marks), written)
        if re.findall("|".join(marks), written) != list(marks):
            raise ValueError("the chat template leaves out a turn of this conversation, or writes one twice.")
        return pieces


def _apart(text: str, learned: bool) -> list[Span]:
    """Pictures in what a model says are not learned."""
    pieces = [piece for piece in re.split(f"({IMAGE})", text) if piece]
    return [Span(piece, learned and piece != IMAGE) for piece in pieces]


def missing_start(tokenizer: Any) -> str:
    """The token that begins a sequence, where a tokenizer has one and does not add it by itself."""
    return "" if tokenizer.bos_token is None or starts_with_bos(tokenizer) else tokenizer.bos_token


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins every sequence with a token of its own."""
    return bool(tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id])
