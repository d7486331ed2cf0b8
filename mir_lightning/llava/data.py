"""Picture-caption batches for pre-training, and the held-out probe that goes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaProcessor

from mir_lightning.functional.checks import check_at_least_one
from mir_lightning.llava.shapes import Split, draw_sample
from mir_lightning.probing.probe import Probe

# A system text comes first so that the attention sink, the first token, is not a vision token.
_PROMPT = (
    "<|im_start|>system\nYou describe pictures.<|im_end|>\n"
    "<|im_start|>user\nPicture: {image}<|im_end|>\n<|im_start|>assistant\n"
)
_END = "<|im_end|>\n"


class CaptionCollator:
    """Turn ``(picture, caption)`` pairs into a batch for a LLaVA-style model.

    The loss is on the caption and its end token only: ``labels`` are -100 elsewhere.

    Args:
        processor: tokenizer and image processor of the model, with an ``image_token``.
    """

    def __init__(self, processor: LlavaProcessor) -> None:
        self.processor = processor
        self.prompt = _PROMPT.format(image=processor.image_token)
        after_image = _PROMPT.split("{image}")[1]
        self._tokens_after_image = len(processor.tokenizer(after_image)["input_ids"])

    def __call__(self, samples: Sequence[tuple[Image.Image, str]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` ``[B, S]`` and ``pixel_values`` ``[B, 3, H, W]``."""
        batch = self.processor(
            images=[image for image, _ in samples],
            text=[self.prompt + caption + _END for _, caption in samples],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        answer = self._after_prompt(batch["input_ids"]) & batch["attention_mask"].bool()
        return {**batch, "labels": batch["input_ids"].masked_fill(~answer, -100)}

    def _after_prompt(self, input_ids: Tensor) -> Tensor:
        """Boolean ``[B, S]``; the prompt ends in a newline, so no token spans its boundary to the caption."""
        positions = torch.arange(input_ids.shape[1])
        last_image = (positions * (input_ids == self.processor.image_token_id)).amax(dim=1, keepdim=True)
        return positions > last_image + self._tokens_after_image


class ShapesDataset(Dataset):
    """``length`` drawn samples of a split; the same index is always the same sample."""

    def __init__(self, split: Split, length: int, seed: int = 0) -> None:
        self.split = split
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return draw_sample(self.split, index, self.seed)


class ShapesDataModule(pl.LightningDataModule):
    """Drawn shapes with captions; needs no files. The model's module gives the processor.

    Args:
        batch_size: samples a batch, on each device.
        num_samples: training samples an epoch.
        probe_size: held-out samples of the probe; their captions never appear in training.
        seed: of the drawings.
        num_workers: processes that draw; 0 draws in the training process.
    """

    def __init__(
        self,
        batch_size: int = 16,
        num_samples: int = 960,
        probe_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_at_least_one(batch_size=batch_size, num_samples=num_samples, probe_size=probe_size)
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.probe_size = probe_size
        self.seed = seed
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        """Batches of the training split."""
        return self._loader("train", self.num_samples)

    def probe(self) -> Probe:
        """The held-out probe, with labels, for :class:`~mir_lightning.MIRCallback`."""
        return Probe(self._loader("held_out", self.probe_size))

    def _loader(self, split: Split, length: int) -> DataLoader:
        workers: dict[str, Any] = {"num_workers": self.num_workers if split == "train" else 0}
        return DataLoader(
            ShapesDataset(split, length, self.seed),
            batch_size=self.batch_size,
            collate_fn=CaptionCollator(self._processor()),
            **workers,
        )

    def _processor(self) -> LlavaProcessor:
        if self.trainer is None:
            raise RuntimeError("ShapesDataModule takes its processor from the module: attach it to a Trainer.")
        module = self.trainer.lightning_module
        assert isinstance(module.processor, LlavaProcessor)
        return module.processor
