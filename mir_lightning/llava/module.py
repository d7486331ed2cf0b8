"""The LightningModule of the recipe: a vision-language model that learns from captions, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from mir_lightning.llava.backbones import FeatureSelect, ModelSource, build_model, build_processor
from mir_lightning.llava.memory import training_memory
from mir_lightning.llava.saved import load_part
from mir_lightning.llava.schedule import (
    Group,
    Part,
    Stage,
    check_stages,
    freeze_all_but,
    optimizer_groups,
    stage_table,
)
from mir_lightning.llava.sharding import shard
from mir_lightning.llava.throughput import training_flops
from mir_lightning.moca import inject_moca, moca_statistics
from mir_lightning.moca.inject import CONFIG_FLAG as MOCA_FLAG
from mir_lightning.vlm import token_masks


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters in the LLM (peft).

    Args:
        r: rank.
        alpha: scaling, divided by the rank.
        dropout: of the adapters' inputs.
        targets: last names of the linear layers to adapt.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LlavaPretraining(pl.LightningModule):
    """Caption pre-training of a vision-language model.

    AdamW, linear warm-up, cosine decay (LLaVA-1.5, section 4), one optimizer for the whole run: what trains in
    several stages keeps its state, and what joins warms up.

    Args:
        llm: folder or hub id of any causal language model.
        vision: folder or hub id of a CLIP, SigLIP or DINOv2 style encoder. Without any of the three: the packaged
            SmolLM2-135M and EfficientNet-Lite0.
        vlm: folder or hub id of a whole vision-language model to go on with, or a ``.ckpt`` of an earlier run,
            instead of the two.
        feature_layer: layer of the encoder whose features the projector gets; -2 is LLaVA-1.5's.
        feature_select: ``"default"`` drops the first feature (CLS), ``"full"`` keeps all.
        attention: implementation, ``"sdpa"``, ``"flash_attention_2"`` or ``"eager"``.
        stages: what trains when; the projector alone by default.
        warmup_ratio: share of the steps in which the learning rate rises, at the start and where a part joins.
        lora: adapters in the LLM, for stages that train ``lora``.
        moca: calibrate the vision tokens after every decoder layer (MIR paper, MoCa); it trains in every stage.
        moca_lr: peak learning rate of MoCa in stages that do not name it.
        parts: files of an earlier run's export to start from: ``projector.safetensors``, ``moca.safetensors``,
            ``adapter/adapter_model.safetensors``.
        gradient_checkpointing: recompute the LLM's layers in the backward pass, for memory.
        compile: run the model through ``torch.compile``.
        betas: of AdamW.
    """

    vlm: PreTrainedModel

    def __init__(
        self,
        llm: str | None = None,
        vision: str | None = None,
        vlm: str | None = None,
        feature_layer: int = -2,
        feature_select: FeatureSelect = "default",
        attention: str = "sdpa",
        stages: Sequence[Stage] = (Stage((Part("projector", 1e-3),)),),
        warmup_ratio: float = 0.03,
        lora: LoraOptions | None = None,
        moca: bool = False,
        moca_lr: float = 1e-3,
        parts: Sequence[Path] = (),
        gradient_checkpointing: bool = False,
        compile: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__()
        check_stages(stages)
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1), got {warmup_ratio}.")
        self.source = ModelSource(llm, vision, vlm, feature_layer, feature_select, attention)
        self.stages = [_with_moca(stage, moca_lr) for stage in stages] if moca else list(stages)
        self.moca = moca
        self.warmup_ratio = warmup_ratio
        self.lora = lora
        self.parts = parts
        self.gradient_checkpointing = gradient_checkpointing
        self.compiles = compile
        self.betas = betas
        self.processor = build_processor(self.source)
        self._starts = [0]  # step at which each stage so far began
        self._tokens = 0
        self._tokens_of_step = 0
        self._groups: list[Group] = []
        self._counted: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        """Build the model once, frozen but for the first stage."""
        if hasattr(self, "vlm"):
            return
        rank_zero_info("loading the model")
        shards = 1 if self.device_mesh is None else self.device_mesh["data_parallel"].size()
        self.vlm = build_model(self.source, self.processor)
        if self.moca and not getattr(self.vlm.config, MOCA_FLAG, False):
            inject_moca(self.vlm)
        if self.lora is not None:
            self._add_adapters(self.lora)
        for file in self.parts:
            load_part(self.vlm, file)
        if self.gradient_checkpointing:
            self.vlm.gradient_checkpointing_enable({"use_reentrant": False})
        if self.compiles:
            self.vlm.compile()
        if self.device_mesh is not None:
            shard(self.vlm, self.device_mesh["data_parallel"])
        self._groups = optimizer_groups(self.vlm, self.stages)
        rank_zero_info(f"memory     {training_memory(self.vlm, self.stages, shards)}")
        freeze_all_but(self.vlm, self.stages[0])

    def _add_adapters(self, lora: LoraOptions) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        targets = rf".*language_model.*\.({'|'.join(lora.targets)})"
        config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
        inject_adapter_in_model(config, self.vlm)

    @property
    def stage(self) -> int:
        """Number of the stage in progress, from 0."""
        return len(self._starts) - 1

    def on_train_start(self) -> None:
        """After a resume, go to the stage that the checkpoint was in."""
        self._enter_stage()

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Go to the next stage where the one in progress is over."""
        stage = self.stages[self.stage]
        begun = self.trainer.global_step - self._starts[-1]
        over = (stage.steps is not None and begun >= stage.steps) or (
            stage.tokens is not None and self._tokens >= stage.tokens
        )
        if over and begun > 0:
            self._starts.append(self.trainer.global_step)
            self._tokens = 0
            self._enter_stage()
            self._change_rates()

    def _enter_stage(self) -> None:
        stage = self.stages[self.stage]
        freeze_all_but(self.vlm, stage)
        self._flops = training_flops(self.vlm)
        if isinstance(self.trainer.strategy, DDPStrategy):
            self._rewrap(self.trainer.strategy)
        rank_zero_info(
            f"stage {self.stage + 1} of {len(self.stages)}, from step {self._starts[-1]}\n"
            f"{stage_table(self.vlm, stage)}"
        )

    def _rewrap(self, strategy: DDPStrategy) -> None:
        """DDP reduces the gradients of what could learn when it was made: make it again."""
        if isinstance(strategy.model, torch.nn.parallel.DistributedDataParallel):
            strategy.model = self
            strategy.configure_ddp()

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the labelled tokens; over the ranks together, each token weighs the same."""
        loss = self.vlm(**_labelled_only(batch), use_cache=False).loss
        if self.trainer.world_size > 1:
            labelled = (batch["labels"][:, 1:] != -100).sum().float()
            loss = loss * labelled / self.trainer.strategy.reduce(labelled.clone(), reduce_op="mean")
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        if self.stages[self.stage].tokens is not None:
            self._tokens_of_step += int(batch["attention_mask"].sum())
        self._counted = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.moca and (self.trainer.global_step + 1) % every == 0:
            self.log_dict(moca_statistics(self.vlm))
        return loss

    @property
    def flops_per_batch(self) -> float | None:
        """Floating-point operations of the last batch on this rank; Lightning's ThroughputMonitor reads it."""
        if not self._counted:
            return None
        vision = token_masks(self.vlm.config, self._counted, "all").vision
        return self._flops.of_batch(self._counted, vision)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the step's tokens, over all ranks, where a stage goes by them."""
        if self.stages[self.stage].tokens is not None:
            of_step = torch.tensor(self._tokens_of_step, device=self.device)
            self._tokens += int(self.trainer.strategy.reduce(of_step, reduce_op="sum"))
        self._tokens_of_step = 0

    def configure_optimizers(self) -> Any:
        """AdamW over all that ever learns; what is frozen has no gradient, and is passed over."""
        groups = [
            {"params": list(group.parameters), "lr": 1.0, "weight_decay": group.weight_decay(self.stage)}
            for group in self._groups
        ]
        optimizer = torch.optim.AdamW(groups, betas=self.betas)
        rates: list[Callable[[int], float]] = [partial(self._rate, group) for group in self._groups]
        return [optimizer], [{"scheduler": LambdaLR(optimizer, rates), "interval": "step"}]

    def _rate(self, group: Group, step: int) -> float:
        total = int(self.trainer.estimated_stepping_batches)
        return group.lr(step, self._starts, round(self.warmup_ratio * total), total)

    def _change_rates(self) -> None:
        """Rates and weight decay of the stage just entered; the scheduler set those of the one before."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        for group, state in zip(self._groups, optimizer.param_groups, strict=True):
            state["lr"] = self._rate(group, self.trainer.global_step)
            state["weight_decay"] = group.weight_decay(self.stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's config, so that a checkpoint can be read without this module, and the stage."""
        checkpoint["vlm_config"] = self.vlm.config.to_dict()
        checkpoint["stage_starts"] = self._starts
        checkpoint["stage_tokens"] = self._tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Where in the schedule the run was."""
        self._starts = list(checkpoint["stage_starts"])
        self._tokens = checkpoint["stage_tokens"]
        if len(self._starts) > len(self.stages):
            raise ValueError(
                f"stages: the checkpoint is in stage {len(self._starts)}, and the schedule has {len(self.stages)}."
            )


def _with_moca(stage: Stage, lr: float) -> Stage:
    """The stage, with MoCa among what learns."""
    if any(part.module == "moca" for part in stage.train):
        return stage
    return replace(stage, train=(*stage.train, Part("moca", lr)))


def _labelled_only(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The batch, asking for logits only where labels are: everything before the first of them costs none."""
    labels = batch["labels"]
    first = int((labels != -100).any(dim=0).nonzero()[0])
    start = max(first - 1, 0)  # the token before predicts the first one
    return {**batch, "labels": labels[:, start:], "logits_to_keep": labels.shape[1] - start}
