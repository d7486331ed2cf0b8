"""Samples as a batch: token ids, labels on what the model says, pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from mir_lightning.functional.checks import check_at_least_one
from mir_lightning.llava.datasets import Sample
from mir_lightning.llava.prompts import IMAGE, Prompt, starts_with_bos


class ConversationCollator:
    """Turn samples into a batch for a LLaVA-style model; several pictures a sample, or none.

    Every span of a conversation is tokenised by itself, so the boundary between what is learned and what is not is
    one between tokens: ``labels`` are -100 outside what the model says.

    Args:
        processor: tokenizer and image processor of the model, with an ``image_token``.
        prompt: how a conversation is written.
        max_length: tokens that a sample is cut to; one cut inside its pictures is refused.
    """

    def __init__(self, processor: Any, prompt: Prompt, max_length: int = 2048) -> None:
        check_at_least_one(max_length=max_length)
        self.processor = processor
        self.prompt = prompt
        self.max_length = max_length

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask``, ``labels`` ``[B, S]``, pixels, and ``unreadable``, a list."""
        written = [self.prompt(sample.turns, len(sample.images)) for sample in samples]
        images = [image for sample in samples for image in sample.images]
        with_images = [text for spans in written for text, _ in spans if IMAGE in text]
        pixels, expanded = self._process(images, with_images)
        rows = [self._tokens(spans, expanded) for spans in written]
        length = max(len(ids) for ids, _ in rows)
        pad = self.processor.tokenizer.pad_token_id
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
        }
        unreadable = [line for sample in samples for line in sample.unreadable]
        return {**batch, **pixels, "unreadable": unreadable}

    def _process(self, images: list[Image.Image], texts: list[str]) -> tuple[dict[str, Any], Iterator[list[int]]]:
        """Pixels, and the token ids of each text with its placeholders expanded."""
        if not images:
            return {}, iter(())
        made = self.processor(
            images=images,
            text=[text.replace(IMAGE, self.processor.image_token) for text in texts],
            add_special_tokens=False,
        )
        ids = made.pop("input_ids")
        made.pop("attention_mask")
        pixels = {key: torch.stack([torch.as_tensor(v) for v in value]) for key, value in made.items()}
        return pixels, iter(ids)

    def _tokens(
        self, spans: Sequence[tuple[str, bool]], expanded: Iterator[list[int]]
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of a sample."""
        tokenizer = self.processor.tokenizer
        marked = starts_with_bos(tokenizer) and not self.prompt.writes_its_start
        ids = [tokenizer.bos_token_id] if marked else []
        labels = [-100] * len(ids)
        for text, learned in spans:
            if IMAGE in text:
                span = next(expanded)
                if len(ids) + len(span) > self.max_length:
                    raise ValueError(
                        f"max_length={self.max_length} would cut a sample inside its pictures, which take "
                        f"{len(span)} tokens: raise it."
                    )
            else:
                span = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += span
            labels += span if learned else [-100] * len(span)
        return ids[: self.max_length], labels[: self.max_length]
