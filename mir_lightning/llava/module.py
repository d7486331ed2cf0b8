"""The LightningModule of the recipe: a LLaVA whose projector, and perhaps LLM, learn from captions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, get_cosine_schedule_with_warmup

from mir_lightning.llava.backbones import build_packaged_llava, build_packaged_processor


class LlavaPretraining(pl.LightningModule):
    """Caption pre-training of SmolLM2-135M and EfficientNet-Lite0 joined by a Linear-GELU-Linear projector.

    The vision encoder stays frozen. AdamW without weight decay, linear warm-up, cosine decay
    (LLaVA-1.5, section 4: warm-up ratio 0.03, weight decay 0).

    Args:
        projector_lr: peak learning rate of the projector.
        llm_lr: peak learning rate of the LLM; ``None`` keeps it frozen.
        warmup_ratio: share of the steps in which the learning rate rises.
    """

    vlm: LlavaForConditionalGeneration

    def __init__(
        self, projector_lr: float = 2e-4, llm_lr: float | None = None, warmup_ratio: float = 0.03
    ) -> None:
        super().__init__()
        for name, value in (("projector_lr", projector_lr), ("llm_lr", llm_lr)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1), got {warmup_ratio}.")
        self.projector_lr = projector_lr
        self.llm_lr = llm_lr
        self.warmup_ratio = warmup_ratio
        self.processor: LlavaProcessor = build_packaged_processor()

    def configure_model(self) -> None:
        """Build the model once, with its frozen parts in evaluation mode."""
        if hasattr(self, "vlm"):
            return
        self.vlm = build_packaged_llava()
        self.vlm.requires_grad_(False)
        self.vlm.eval()
        for part, _ in self._trained_parts():
            part.requires_grad_(True)
            part.train()

    def _trained_parts(self) -> list[tuple[nn.Module, float]]:
        """Modules that learn, with their learning rates."""
        parts: list[tuple[nn.Module, float]] = [(self.vlm.model.multi_modal_projector, self.projector_lr)]
        if self.llm_lr is not None:
            parts.append((self.vlm.model.language_model, self.llm_lr))
        return parts

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the caption tokens."""
        loss = self.vlm(**_captions_only(batch), use_cache=False).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, one group a trained part."""
        groups = [{"params": list(part.parameters()), "lr": lr} for part, lr in self._trained_parts()]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = get_cosine_schedule_with_warmup(optimizer, round(self.warmup_ratio * steps), steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's config, so that a checkpoint can be read without this module."""
        checkpoint["vlm_config"] = self.vlm.config.to_dict()

    def save_pretrained(self, folder: Path) -> None:
        """Write model and processor in Hugging Face format."""
        self.vlm.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def _captions_only(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The batch, asking for logits only where labels are: everything before the first caption token costs none."""
    labels = batch["labels"]
    first = int((labels != -100).any(dim=0).nonzero()[0])
    start = max(first - 1, 0)  # the token before predicts the first one
    return {**batch, "labels": labels[:, start:], "logits_to_keep": labels.shape[1] - start}
