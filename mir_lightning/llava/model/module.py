"""The LightningModule of the recipe: a vision-language model that learns from captions, stage by stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from peft import LoraConfig
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from mir_lightning.callbacks.schedule import tokens_of
from mir_lightning.llava.console import stage_table
from mir_lightning.llava.costs import training_flops, training_memory
from mir_lightning.llava.data.mixture import source_losses
from mir_lightning.llava.model.backbones import ModelSource, build_model, build_processor
from mir_lightning.llava.model.experts import (
    Router,
    RouterLosses,
    expert_load,
    find_routers,
    recording,
    router_losses,
)
from mir_lightning.llava.model.mm1 import resolved
from mir_lightning.llava.model.saving import load_part
from mir_lightning.llava.model.sharding import shard
from mir_lightning.llava.model.stages import (
    Group,
    Part,
    Stage,
    checkpoint_layers,
    freeze_all_but,
    optimizer_groups,
)
from mir_lightning.llava.trainer import between_steps
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

    def config(self) -> LoraConfig:
        """The same for peft."""
        targets = rf".*language_model.*\.({'|'.join(self.targets)})"
        return LoraConfig(r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets)


_COUNTED = ("input_ids", "attention_mask", "labels", "position_ids")


class LlavaPretraining(pl.LightningModule):
    """Caption pre-training of a vision-language model.

    AdamW, linear warm-up, cosine decay (LLaVA-1.5, section 4), one optimizer for the whole run: what trains in
    several stages keeps its state, and what joins warms up.

    Args:
        stages: what trains when; the projector alone by default.
        warmup_ratio: share of the steps in which the learning rate rises, at the start and where a part joins.
        lora: adapters in the LLM, for stages that train ``lora``.
        moca: calibrate the vision tokens after every decoder layer (MIR paper, MoCa); it trains in every stage.
        moca_lr: peak learning rate of MoCa in stages that do not name it.
        router: losses of the routers of a mixture of experts; null for none.
        parts: files of an earlier run's export to start from: ``projector.safetensors``, ``moca.safetensors``,
            ``adapter/adapter_model.safetensors``.
        gradient_checkpointing: recompute the LLM's layers in the backward pass, for memory.
        compile: run the model through ``torch.compile``.
        betas: of AdamW.
        source: which model, as :class:`~mir_lightning.llava.model.backbones.ModelSource` takes it.
    """

    vlm: PreTrainedModel

    def __init__(
        self,
        stages: Sequence[Stage] = (Stage((Part("projector", 1e-3),)),),
        warmup_ratio: float = 0.03,
        lora: LoraOptions | None = None,
        moca: bool = False,
        moca_lr: float = 1e-3,
        router: RouterLosses | None = RouterLosses(),
        parts: Sequence[Path] = (),
        gradient_checkpointing: bool = False,
        compile: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        **source: Any,
    ) -> None:
        super().__init__()
        if not stages:
            raise ValueError("stages is empty: at least one is needed.")
        for number, stage in enumerate(stages, start=1):
            bounded = stage.steps is not None or stage.tokens is not None
            if bounded != (number < len(stages)):
                trouble = "is the last and must not say its length" if bounded else "must say its steps or tokens"
                raise ValueError(f"stage {number} of {len(stages)} {trouble}: only the last one runs to the end.")
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1), got {warmup_ratio}.")
        self.source = ModelSource(**source)
        self.stages = list(stages)
        for number, stage in enumerate(stages if moca else ()):
            if all(part.module != "moca" for part in stage.train):
                self.stages[number] = replace(stage, train=(*stage.train, Part("moca", moca_lr)))
        self.moca = moca
        self.warmup_ratio = warmup_ratio
        self.lora = lora
        self.router = router
        self.parts = parts
        self.gradient_checkpointing = gradient_checkpointing
        self.compiles = compile
        self.betas = betas
        self.processor = build_processor(self.source)
        self._starts = [0]  # step at which each stage so far began
        self._tokens = 0  # of the stage in progress, where it goes by them
        self._groups: list[Group] = []
        self._routers: list[Router] = []
        self._counted: dict[str, Tensor] = {}
        self._losses = torch.zeros(())  # by source, of the step in progress

    def configure_model(self) -> None:
        """Build the model once, frozen but for the first stage."""
        if hasattr(self, "vlm"):
            return
        rank_zero_info("loading the model")
        self.vlm = build_model(self.source, self.processor)
        if self.moca and not getattr(self.vlm.config, MOCA_FLAG, False):
            inject_moca(self.vlm)
        if self.lora is not None:
            self.vlm.add_adapter(self.lora.config())
            self.vlm.peft_config["default"].base_model_name_or_path = None  # with what else learned it is no base
        for file in self.parts:
            load_part(self.vlm, file)
        if self.gradient_checkpointing:
            checkpoint_layers(self.vlm)
        if self.compiles:
            self.vlm.compile()
        self.stages = resolved(self.vlm, self.stages)
        mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
        if mesh is not None:
            shard(self.vlm, mesh)
        self._groups = optimizer_groups(self.vlm, self.stages)
        self._routers = [] if self.router is None else find_routers(self.vlm)
        if self._routers:
            text = self.vlm.config.get_text_config(decoder=True)
            text.output_router_logits = False  # it would add a loss of its own
        memory = training_memory(self.vlm, self.stages, 1 if mesh is None else mesh.size())
        rank_zero_info(f"memory     {memory}")
        freeze_all_but(self.vlm, self.stages[0])

    @property
    def stage(self) -> int:
        """Number of the stage in progress, from 0."""
        return len(self._starts) - 1

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Go to the next stage, with its rates and weight decay, where the one in progress is over."""
        stage, step = self.stages[self.stage], self.trainer.global_step
        over = stage.steps is not None and step - self._starts[-1] >= stage.steps
        over |= stage.tokens is not None and self._tokens >= stage.tokens
        if not over or batch_idx % self.trainer.accumulate_grad_batches:
            return
        self._starts.append(step)
        self._tokens = 0
        self.on_train_start()
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        for group, state in zip(self._groups, optimizer.param_groups, strict=True):
            state["lr"] = self._rate(group, step)  # the scheduler set that of the stage before
            state["weight_decay"] = group.weight_decay(self.stage)

    def on_train_start(self) -> None:
        """Enter the stage in progress."""
        stage = self.stages[self.stage]
        freeze_all_but(self.vlm, stage)
        self._flops = training_flops(self.vlm)
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
            strategy.model = self  # DDP reduces the gradients of what could learn when it was made: make it again
            strategy.configure_ddp()
        which = f"stage {self.stage + 1} of {len(self.stages)}, from step {self._starts[-1]}"
        rank_zero_info(f"{which}\n{stage_table(self.vlm, stage)}")

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the labelled tokens, which is logged, and the routers' losses.

        Over the ranks together, each labelled token weighs the same in the one, and each token in the others.
        """
        flash = "flash" in str(self.vlm.config._attn_implementation)
        with recording(self._routers) as routed:
            output = self.vlm(**model_inputs(batch, flash), use_cache=False)
        loss, (share, router_share) = output.loss, torch.ones(2)
        if self.trainer.world_size > 1:
            counts = torch.stack([(batch["labels"][:, 1:] != -100).sum(), batch["attention_mask"].sum()]).float()
            share, router_share = counts / self.trainer.strategy.reduce(counts.clone(), reduce_op="mean")
        loss = loss * share
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        if routed:
            loss = loss + self._router_loss(routed, batch["attention_mask"], router_share)
        if self.stages[self.stage].tokens is not None:
            tokens = torch.tensor(tokens_of(batch), device=self.device)
            self._tokens += int(self.trainer.strategy.reduce(tokens, reduce_op="sum"))
        self._counted = {name: batch[name] for name in _COUNTED if name in batch}
        if self.moca and self._logs_this_step:
            self.log_dict(moca_statistics(self.vlm))
        if "source" in batch and self._logs_this_step:
            self._log_sources(batch, output.logits.detach(), batch_idx)
        return loss

    def _log_sources(self, batch: Mapping[str, Any], logits: Tensor, batch_idx: int) -> None:
        """Of a mixture, the step's loss by source, and the shares of the samples so far, over all ranks.

        Straight to the loggers: Lightning would repeat the value of a source that a step has no sample of.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        names = data.source_names
        self._losses = source_losses(batch, logits, names) + self._losses
        if not between_steps(self.trainer, batch_idx):
            return
        drawn = torch.tensor([data.drawn[name] for name in names], dtype=torch.float64, device=logits.device)
        counts, self._losses = torch.cat([self._losses, drawn[:, None]], dim=1), torch.zeros(())
        losses, tokens, samples = self.trainer.strategy.reduce(counts, reduce_op="sum").unbind(dim=1)
        shares, means = samples / samples.sum(), losses / tokens
        row = {f"train_share/{name}": share for name, share in zip(names, shares.tolist(), strict=True)}
        row |= {
            f"train_sources/{name}": mean for name, mean in zip(names, means.tolist(), strict=True) if mean == mean
        }
        for logger in self.loggers:
            logger.log_metrics(row, step=self.trainer.global_step)

    @property
    def _logs_this_step(self) -> bool:
        return (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def _router_loss(self, logits: Sequence[Tensor], attention_mask: Tensor, share: Tensor) -> Tensor | float:
        """Weighted sum; 0 in stages without the LLM: tokens are not bent to suit frozen routers."""
        assert self.router is not None
        top_k = self.vlm.config.get_text_config(decoder=True).num_experts_per_tok
        balance, z = (each * share for each in router_losses(logits, top_k, attention_mask))
        self.log_dict({"train/router_balance": balance, "train/router_z": z}, sync_dist=True)
        if self._logs_this_step:
            self.log_dict(expert_load(self._routers, logits, top_k, attention_mask), sync_dist=True)
        if not any(part.module in ("llm", "lora") for part in self.stages[self.stage].train):
            return 0.0
        return self.router.balance * balance + self.router.z * z

    @property
    def flops_per_batch(self) -> float | None:
        """Floating-point operations of the last batch on this rank; Lightning's ThroughputMonitor reads it."""
        batch = self._counted
        return self._flops(batch, token_masks(self.vlm.config, batch, "all").vision) if batch else None

    def configure_optimizers(self) -> Any:
        """AdamW over all that ever learns; what is frozen has no gradient, and is passed over."""
        groups: list[dict[str, Any]] = [
            {"params": list(group.parameters.values()), "weight_decay": group.weight_decay(self.stage)}
            for group in self._groups
        ]
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=self.betas)
        scheduler = LambdaLR(optimizer, [partial(self._rate, group) for group in self._groups])
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _rate(self, group: Group, step: int) -> float:
        total = int(self.trainer.estimated_stepping_batches)
        return group.lr(step, self._starts, round(self.warmup_ratio * total), total)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's config, so that a checkpoint can be read without this module, and the stage."""
        checkpoint["vlm_config"] = self.vlm.config.to_dict()
        checkpoint["stage_starts"] = self._starts
        checkpoint["stage_tokens"] = self._tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Where in the schedule the run was."""
        self._starts = list(checkpoint["stage_starts"])
        self._tokens = checkpoint["stage_tokens"]
        begun, planned = len(self._starts), len(self.stages)
        if begun > planned:
            raise ValueError(f"stages: the checkpoint is in stage {begun}, and the schedule has {planned}.")


def model_inputs(batch: Mapping[str, Any], flash: bool) -> dict[str, Any]:
    """The batch, asking for logits only where labels are: everything before the first of them costs none.

    Packed, without the attention mask: transformers tells samples apart by their positions. For flash attention as
    one row, which its kernels want.
    """
    given = {key: value for key, value in batch.items() if key != "source"}
    if "position_ids" in given:
        del given["attention_mask"]
        by_token = ("input_ids", "labels", "position_ids") if flash else ()
        given |= {key: given[key].reshape(1, -1) for key in by_token}
    labels = given["labels"]
    first = int((labels != -100).any(dim=0).nonzero()[0])
    start = max(first - 1, 0)  # the token before predicts the first one
    return {**given, "labels": labels[:, start:], "logits_to_keep": labels.shape[1] - start}
