"""How to reach the model, and the other ranks, under each of Lightning's strategies."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mir_lightning.probing.network import Forward

_SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


def check_data_parallel(trainer: pl.Trainer, callback: str) -> None:
    """Raise a ``ValueError``, naming the callback, unless every rank is a replica with data of its own."""
    sampling = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    replicas = sampling.get("num_replicas", 1)
    if replicas != trainer.world_size:
        raise ValueError(
            f"{callback} does not support tensor parallelism: {trainer.world_size} ranks hold {replicas} data-"
            "parallel replicas. Use tensor_parallel_size=1, or evaluate saved checkpoints."
        )


def forward_through_strategy(trainer: pl.Trainer, pl_module: pl.LightningModule, vlm: nn.Module) -> Forward | None:
    """What runs ``vlm`` through the root that a strategy shards, so that its parameters are gathered.

    ``None`` where the model can be called itself. For the length of a call the ``forward`` of the root (of the
    LightningModule, where the strategy wraps that) is the model's, as Lightning does it for ``validation_step``.
    """
    if not isinstance(trainer.strategy, _SHARDED) or trainer.model is None:
        return None
    if trainer.model is not pl_module:
        return _redirection(trainer.model, pl_module, vlm)
    root = next(module for module in _path_to(vlm, pl_module) if isinstance(module, FSDPModule) or module is vlm)
    return None if root is vlm else _redirection(root, root, vlm)


def _path_to(module: nn.Module, root: nn.Module) -> list[nn.Module]:
    """The modules from ``root`` down to ``module``, both included."""
    name = next(name for name, found in root.named_modules() if found is module)
    parts = name.split(".") if name else []
    return [root.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]


def _redirection(entrance: nn.Module, patched: nn.Module, target: nn.Module) -> Forward:
    """Call ``entrance`` so that, where it reaches the ``forward`` of ``patched``, ``target`` runs instead."""

    def forward(**inputs: Any) -> Any:
        own = vars(patched).get("forward")

        def restore() -> None:
            if own is None:
                vars(patched).pop("forward", None)
            else:
                patched.forward = own

        def redirected(**given: Any) -> Any:
            restore()
            return target(**given)

        patched.forward = redirected
        try:
            return entrance(**inputs)
        finally:
            restore()

    return forward
