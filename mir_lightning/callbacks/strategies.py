"""How to reach the model, and the other ranks, under each of Lightning's strategies."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from mir_lightning.probing.run import Forward

_SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


def check_data_parallel(trainer: pl.Trainer) -> None:
    """Raise a ``ValueError`` unless every rank is a replica with data of its own."""
    sampling = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    replicas = sampling.get("num_replicas", 1)
    if replicas != trainer.world_size:
        raise ValueError(
            f"MIRCallback does not support tensor parallelism: {trainer.world_size} ranks hold {replicas} data-"
            "parallel replicas. Use tensor_parallel_size=1, or evaluate_mir on saved checkpoints."
        )


def forward_through_strategy(trainer: pl.Trainer, pl_module: pl.LightningModule, vlm: nn.Module) -> Forward | None:
    """What runs ``vlm`` through the root that a strategy shards, so that its parameters are gathered.

    ``None`` where the model can be called itself. For the length of a call the LightningModule's ``forward``
    is the model's, as Lightning does it for ``validation_step``.
    """
    if not isinstance(trainer.strategy, _SHARDED) or trainer.model is None:
        return None
    root = trainer.model

    def forward(**inputs: Any) -> Any:
        own = vars(pl_module).get("forward")

        def restore() -> None:
            if own is not None:
                pl_module.forward = own  # type: ignore[method-assign]
            else:
                vars(pl_module).pop("forward", None)

        def redirected(**given: Any) -> Any:
            restore()
            return vlm(**given)

        pl_module.forward = redirected  # type: ignore[method-assign]
        try:
            return root(**inputs)
        finally:
            restore()

    return forward
