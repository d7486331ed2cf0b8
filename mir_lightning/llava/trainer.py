"""The recipe's Trainer: a precision that suits the machine, and runs that can be killed and started again."""

import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from mir_lightning.callbacks.base import ProbingCallback
from mir_lightning.hardware import best_precision, warn_of_slow_bfloat16

LAST = "last"  # name of the checkpoint that a run goes on from
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class RecipeTrainer(Trainer):
    """Lightning's ``Trainer``, whose precision may be ``"auto"``, and whose checkpoints are whole or not there.

    Args:
        precision: as Lightning has it, or ``"auto"``, which our configs ask for: ``"bf16-mixed"`` where the device
            computes bfloat16 natively, else ``"32-true"``.
        accelerator: as Lightning has it.
        options: of Lightning's Trainer.
    """

    def __init__(self, *, precision: str | int = "32-true", accelerator: str = "auto", **options: Any) -> None:
        self.precision_reason = "as asked for"
        if precision == "auto":
            precision, self.precision_reason = best_precision(accelerator)
        super().__init__(precision=precision, accelerator=accelerator, **options)  # type: ignore[arg-type]
        self.strategy.checkpoint_io = AtomicCheckpointIO()
        if str(precision).startswith("bf16") and self.strategy.root_device.type == "cpu":
            warn_of_slow_bfloat16(f"trainer.precision={precision}", "trainer.precision=auto or 32-true")

    def save_checkpoint(self, *args: Any, **options: Any) -> None:
        """Lightning's, after all rows logged so far: a run that goes on from a checkpoint lacks none before it."""
        for logger in self.loggers:
            logger.save()
        super().save_checkpoint(*args, **options)


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint is written beside its place, then moved into it.

    One that cannot be written, because the disk is full for one, is warned of, and the run goes on; what it was to
    replace is kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self._failed = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write and move."""
        place, self._failed = Path(path), False
        beside = place.with_name(f".{place.name}.part")
        try:
            super().save_checkpoint(checkpoint, beside, storage_options)
            beside.replace(place)
        except OSError as error:
            beside.unlink(missing_ok=True)
            rank_zero_warn(f"{place} could not be written, training goes on: {error}")
            self._failed = True

    def remove_checkpoint(self, path: Any) -> None:
        """Unless the one that was to take its place is not there."""
        if not self._failed:
            super().remove_checkpoint(path)


def remove_leftovers(trainer: Trainer) -> None:
    """Remove what a run that was killed while it wrote has left half written."""
    for folder in (finished_mark(trainer).parent, Path(trainer.default_root_dir)):
        for part in folder.glob(".*.part"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()


def checkpoint_folder(root: str | Path | None) -> str:
    """Where a run with this ``default_root_dir`` keeps its checkpoints."""
    return str(Path(root or ".") / "checkpoints")


def finished_mark(trainer: Trainer) -> Path:
    """A file beside the checkpoints that says that the run came to its end: the same command begins anew."""
    return Path(checkpoint_folder(trainer.default_root_dir)) / "finished"


def interrupted_run(trainer: Trainer) -> str | None:
    """The last checkpoint of the run's folder, unless that run came to its end: then it begins anew."""
    mark = finished_mark(trainer)
    last = mark.with_name(f"{LAST}.ckpt")
    if last.is_file() and mark.exists():
        rank_zero_info(f"the run in {mark.parent} came to its end and begins anew; --ckpt_path={last} goes on")
    elif last.is_file():
        rank_zero_info(f"going on from {last}")
    return str(last) if last.is_file() and not mark.exists() else None


def between_steps(trainer: Trainer, batch_idx: int) -> bool:
    """Whether no gradients are being accumulated when a batch ends: no checkpoint holds those."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


class BetweenSteps(ModelCheckpoint):
    """Lightning's checkpoints, saved between optimizer steps only.

    After a resume Lightning would save in mid-accumulation where the step it began at is due.
    """

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save if it is time."""
        if between_steps(trainer, args[-1]):
            super().on_train_batch_end(trainer, *args)


class SeededBatches(Callback):
    """What is random in a batch is so by seed, step and rank: the same in a run that was stopped before it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Seed Python, NumPy and torch."""
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        place = (int(os.environ.get("PL_GLOBAL_SEED", 0)), trainer.global_step, micro_batch, trainer.global_rank)
        seed = hash(place) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        # Loggers count steps by this; Lightning loses one where the run was stopped at the end of an epoch.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class DivergedError(RuntimeError):
    """A run whose numbers are not finite any more, and will not be again."""


class Divergence(Callback):
    """Ends a run whose loss has not been finite for ``patience`` batches in a row; seen where rows are logged."""

    def __init__(self, patience: int = 20) -> None:
        self.patience = patience
        self._bad = torch.zeros((), dtype=torch.long)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        """Count on the device, look where the Trainer logs."""
        loss = outputs["loss"].detach()
        self._bad = torch.where(loss.isfinite(), 0, self._bad.to(loss.device) + 1)
        if (args[-1] + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        if trainer.strategy.reduce_boolean_decision(bool(self._bad >= self.patience), all=False):
            raise DivergedError(
                f"the run has diverged: by step {trainer.global_step} its loss has not been finite for "
                f"{self.patience} batches or more. Start again from an earlier checkpoint, with a lower learning "
                "rate, a longer warm-up or gradient clipping."
            )


class Preemption(Callback):
    """SIGTERM and SIGUSR1, as a cluster sends them, and Ctrl-C: save after the step in progress, and stop cleanly.

    Python runs signal handlers between its own instructions only, so not during a backward pass. A thread that
    the interpreter wakes at once says what the run is waiting for. A second Ctrl-C stops without saving.
    """

    def __init__(self) -> None:
        self.stopped = False  # by a signal
        self._received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the signals; Lightning's own answer to SIGTERM saves nothing."""
        finished_mark(trainer).unlink(missing_ok=True)
        self._step_began = time.monotonic()
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        waking, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._woken_before = signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._answer, args=(trainer, waking), daemon=True).start()

    def _note(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name

    def _answer(self, trainer: Trainer, waking: socket.socket) -> None:
        """Say what is waited for as soon as a signal comes; in a thread of its own."""
        while numbers := waking.recv(16):
            for number in set(numbers) & set(_SIGNALS):
                rank = f"rank {trainer.global_rank}: " if trainer.world_size > 1 else ""
                again = " Ctrl-C stops at once." if number == signal.SIGINT else ""
                waiting = f"{rank}{signal.Signals(number).name}: waiting for {self._in_progress(trainer)}"
                print(f"\n{waiting}, then saving and stopping.{again}", file=sys.stderr, flush=True)

    def _in_progress(self, trainer: Trainer) -> str:
        """What the run is doing, since when, and how long it took the last time."""
        for callback in probing_callbacks(trainer):
            if (since := callback.evaluating_since) is not None:
                took = callback.last_seconds
                last = "" if took is None else f", the last took {took:.0f} s"
                running = f"{time.monotonic() - since:.0f} s so far{last}"
                return f"the {callback.name} evaluation of step {trainer.global_step} ({running})"
        return f"step {trainer.global_step + 1} ({time.monotonic() - self._step_began:.0f} s so far)"

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """A batch begins."""
        self._step_began = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Between optimizer steps, when any rank has got a signal."""
        if self.stopped or not between_steps(trainer, args[-1]):
            return
        if trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            self.stopped = trainer.should_stop = True
            place = finished_mark(trainer).with_name(f"{LAST}.ckpt")
            trainer.save_checkpoint(place)
            for callback in probing_callbacks(trainer):
                callback.at_end = False  # this is no end
            rank_zero_info(
                f"stopped by {self._received or 'a signal to another rank'} at step {trainer.global_step}; saved "
                f"{place}. The same command goes on from there."
            )

    def teardown(self, trainer: Trainer, pl_module: Any, stage: Any) -> None:
        """Give the signals back."""
        if self._before:
            signal.set_wakeup_fd(self._woken_before)
            self._woken.close()  # ends the thread
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:  # else Lightning has given it back already
                signal.signal(number, handler)
        self._before = {}

    on_exception = teardown  # type: ignore[assignment]  # there is no teardown then


def probing_callbacks(trainer: Trainer) -> list[ProbingCallback]:
    """Those of the Trainer's callbacks that evaluate the model in training."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ProbingCallback)]
