"""Models too large for one device: FSDP2 over all ranks."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from mir_lightning.vlm import find_decoder


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's model parallelism with every rank a data-parallel one: ``--trainer.strategy=fsdp2``.

    Checkpoints are single files, written by rank 0 as under other strategies: whole or not there. A run that began
    with this strategy goes on with it, on any number of devices.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        """All devices share the parameters."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read model and optimizer, the state of parts that learned and are frozen now too.

        torch reads the state of what learns, so exactly what has a state is taken to learn for as long.
        """
        assert self.model is not None
        saved = torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True)["optimizer_states"]
        stateful = {index for optimizer in saved for index in optimizer["state"]}
        parameters = list(self.model.parameters())
        learning = [parameter.requires_grad for parameter in parameters]
        for index, parameter in enumerate(parameters):
            parameter.requires_grad_(index in stateful)
        loaded: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        for parameter, learns in zip(parameters, learning, strict=True):
            parameter.requires_grad_(learns)
        return loaded


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all devices")


def shard(vlm: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Share the parameters over the mesh, gathered for a forward or backward pass one decoder layer at a time."""
    empty = {parameter for parameter in vlm.parameters() if not parameter.numel()}  # torch cannot gather them
    for layer in (*find_decoder(vlm).layers, vlm):
        fully_shard(layer, mesh=mesh, ignored_params=empty)
