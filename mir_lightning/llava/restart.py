"""A run that can be killed at any time and started again with the same command."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

LAST = "last"  # name of the checkpoint that a run goes on from
_FINISHED = "finished"


def checkpoint_folder(root: str | Path | None) -> str:
    """Where a run with this ``default_root_dir`` keeps its checkpoints."""
    return str(Path(root or ".") / "checkpoints")


def interrupted_run(trainer: pl.Trainer) -> str | None:
    """The last checkpoint of the run's folder, unless that run came to its end: then it begins anew."""
    folder = Path(checkpoint_folder(trainer.default_root_dir))
    last = folder / f"{LAST}.ckpt"
    if not last.is_file():
        return None
    if (folder / _FINISHED).exists():
        rank_zero_info(f"the run in {folder} came to its end and begins anew; --ckpt_path={last} goes on from it")
        return None
    rank_zero_info(f"going on from {last}")
    return str(last)


def begin_run(trainer: pl.Trainer) -> None:
    """The run has not come to its end yet."""
    (Path(checkpoint_folder(trainer.default_root_dir)) / _FINISHED).unlink(missing_ok=True)


def mark_finished(trainer: pl.Trainer) -> None:
    """The run came to its end: the same command begins anew."""
    folder = Path(checkpoint_folder(trainer.default_root_dir))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FINISHED).touch()


def between_steps(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether no gradients are being accumulated when a batch ends: no checkpoint holds those."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


class BetweenSteps(ModelCheckpoint):
    """Lightning's checkpoints, saved between optimizer steps only.

    After a resume Lightning would save in mid-accumulation where the step it began at is due.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time."""
        if between_steps(trainer, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint is whole or it is not there: written beside its place, then moved into it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write and move."""
        place = Path(path)
        beside = place.with_name(f".{place.name}.part")
        super().save_checkpoint(checkpoint, beside, storage_options)
        beside.replace(place)


class RandomStates(pl.Callback):
    """Random states of every rank in the checkpoints: dropout goes on as it would have."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the states, one entry a rank."""
        states: list[Any] = [_random_states()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            dist.all_gather_object(states, _random_states())
        checkpoint["random_states"] = states

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep those of this rank until training starts; none where the ranks were fewer."""
        states = checkpoint.get("random_states", [])
        self._restored = states[trainer.global_rank] if trainer.global_rank < len(states) else None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first batch, when all that draws random numbers to get ready has done so."""
        if self._restored is not None:
            _restore_random_states(self._restored)
            self._restored = None
            # Loggers count steps by this; Lightning loses one where the run was stopped at the end of an epoch.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def _random_states() -> dict[str, Any]:
    """Plain numbers and tensors, loadable with ``weights_only``."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
