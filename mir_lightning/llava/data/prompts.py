"""How a conversation is written for a model, and which parts of it the model learns to say."""

from collections.abc import Sequence
from typing import Any

from mir_lightning.probing.choices.items import (
    IMAGE,  # where a picture stands in a turn, whatever a model's own is
)

Span = tuple[str, bool]  # text, and whether it is learned


class PlainPrompt:
    """LLaVA's pre-training format: the pictures, what the model says, a line break; nothing else.

    The human's turns are left out (LLaVA-1.5, ``plain``). A text of a single turn is learned whole.
    """

    writes_its_start = False  # with the token that begins a sequence, where a model wants one

    def __call__(self, turns: Sequence[str], images: int) -> list[Span]:
        """Spans of a conversation with so many pictures."""
        said = turns[1::2] if len(turns) > 1 else turns
        text = "\n".join(turn.replace(IMAGE, "").strip() for turn in said)
        return [*([(IMAGE * images, False)] if images else []), (f"{text}\n", True)]

    def question(self, text: str) -> str:
        """A user's turn, up to where the model's answer begins, for a tokenizer that marks the start by itself."""
        return text


class ChatPrompt(PlainPrompt):
    """The chat template of a tokenizer; the model's turns are learned, with the mark that ends them.

    A ``system`` text comes first, for templates that know one. A first token that is no picture keeps the
    attention sink out of the vision tokens. A tokenizer without chat template raises a ``ValueError``.
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
            now = self._write(messages, more_follows=not answers and place + 1 < len(turns))
            spans.append((now[len(written) :], answers or len(turns) == 1))
            written = now
        return spans

    def question(self, text: str) -> str:
        """A user's turn, up to where the model's answer begins."""
        written = self._write([*self.system, {"role": "user", "content": text}], more_follows=True)
        return written.removeprefix(self.tokenizer.bos_token) if starts_with_bos(self.tokenizer) else written

    def _write(self, messages: list[dict[str, str]], more_follows: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=more_follows)


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins every sequence with a token of its own."""
    return bool(tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id])
