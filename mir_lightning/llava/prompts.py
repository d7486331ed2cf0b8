"""How a conversation is written for a model, and which parts of it the model learns to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

IMAGE = "<image>"  # where a picture stands in a turn, whatever the model's own placeholder is

Span = tuple[str, bool]  # text, and whether it is learned


class Prompt(Protocol):
    """A way to write a conversation.

    Attributes:
        writes_its_start: whether its text holds the token that begins a sequence, where a model wants one.
    """

    writes_its_start: bool

    def __call__(self, turns: Sequence[str], images: int) -> list[Span]:
        """Spans of a conversation with so many pictures."""


class PlainPrompt:
    """LLaVA's pre-training format: the pictures, what the model says, a line break; nothing else.

    The human's turns are left out (LLaVA-1.5, ``plain``). A text of a single turn is learned whole.
    """

    writes_its_start = False

    def __call__(self, turns: Sequence[str], images: int) -> list[Span]:
        """Spans of a conversation with so many pictures."""
        said = turns[1::2] if len(turns) > 1 else turns
        text = "\n".join(turn.replace(IMAGE, "").strip() for turn in said)
        return [*([(IMAGE * images, False)] if images else []), (f"{text}\n", True)]


class ChatPrompt:
    """The chat template of a tokenizer; the model's turns are learned, with the mark that ends them.

    Args:
        tokenizer: with a chat template.
        system: what comes first, for templates that know a system text. A first token that is no picture keeps the
            attention sink out of the vision tokens.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """

    writes_its_start = True

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(f'prompt "chat": {type(tokenizer).__name__} has no chat template; use "plain".')
        self.tokenizer = tokenizer
        self.system = [] if system is None else [{"role": "system", "content": system}]

    def __call__(self, turns: Sequence[str], images: int) -> list[Span]:
        """Spans of a conversation with so many pictures; those without a place come first."""
        first = f"{IMAGE}\n" * (images - sum(turn.count(IMAGE) for turn in turns)) + turns[0]
        messages = list(self.system)
        spans: list[Span] = []
        written = ""
        for place, turn in enumerate((first, *turns[1:])):
            answers = bool(place % 2)
            messages.append({"role": "assistant" if answers else "user", "content": turn})
            more_follows = not answers and place + 1 < len(turns)
            now = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=more_follows)
            spans.append((now[len(written) :], answers or len(turns) == 1))
            written = now
        return spans

    def question(self, text: str) -> str:
        """A user's turn, up to where the model's answer begins, for a tokenizer that marks the start by itself."""
        messages = [*self.system, {"role": "user", "content": text}]
        written = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return written.removeprefix(self.tokenizer.bos_token) if starts_with_bos(self.tokenizer) else written


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins every sequence with a token of its own."""
    return bool(tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id])
