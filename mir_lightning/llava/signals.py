"""Stop when told to: save after the step in progress, and say at once what is being waited for."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from mir_lightning.callbacks.base import ProbingCallback
from mir_lightning.llava.restart import LAST, begin_run, between_steps, checkpoint_folder

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Preemption(pl.Callback):
    """SIGTERM and SIGUSR1, as a cluster sends them, and Ctrl-C: save after the step in progress, and stop cleanly.

    Python runs signal handlers between its own instructions only, so not during a backward pass. A thread that
    the interpreter wakes at once says what the run is waiting for. A second Ctrl-C stops without saving.

    Attributes:
        stopped: whether a signal ended the run.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._received: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._step_began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals; Lightning's own answer to SIGTERM saves nothing."""
        begin_run(trainer)
        self._step_began = time.monotonic()
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        self._waking, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._woken_before = signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._answer, args=(trainer, self._waking), daemon=True).start()

    def _note(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name

    def _answer(self, trainer: pl.Trainer, waking: socket.socket) -> None:
        """Say what is waited for as soon as a signal comes; in a thread of its own."""
        while numbers := waking.recv(16):
            for number in set(numbers) & set(_SIGNALS):
                rank = f"rank {trainer.global_rank}: " if trainer.world_size > 1 else ""
                again = " Ctrl-C stops at once." if number == signal.SIGINT else ""
                name, waiting = signal.Signals(number).name, self._in_progress(trainer)
                message = f"\n{rank}{name}: waiting for {waiting}, then saving and stopping.{again}"
                print(message, file=sys.stderr, flush=True)

    def _in_progress(self, trainer: pl.Trainer) -> str:
        """What the run is doing, since when, and how long it took the last time."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ProbingCallback) and (since := callback.evaluating_since) is not None:
                last = (
                    f", the last took {callback.history[-1][f'{callback.name}_probe/seconds']:.0f} s"
                    if callback.history
                    else ""
                )
                running = time.monotonic() - since
                return (
                    f"the {callback.name} evaluation of step {trainer.global_step} ({running:.0f} s so far{last})"
                )
        return f"step {trainer.global_step + 1} ({time.monotonic() - self._step_began:.0f} s so far)"

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch begins."""
        self._step_began = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between optimizer steps, when any rank has got a signal."""
        if not between_steps(trainer, batch_idx):
            return
        if trainer.strategy.reduce_boolean_decision(self._received is not None, all=False) and not self.stopped:
            self.stopped = trainer.should_stop = True
            place = Path(checkpoint_folder(trainer.default_root_dir)) / f"{LAST}.ckpt"
            trainer.save_checkpoint(place)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, ProbingCallback):
                    callback.at_end = False  # this is no end
            rank_zero_info(
                f"stopped by {self._received or 'a signal to another rank'} at step {trainer.global_step}; saved "
                f"{place}. The same command goes on from there."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back; there is no teardown then."""
        self._give_back()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._woken_before)
        self._woken.close()  # ends the thread
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:  # else Lightning has given it back already
                signal.signal(number, handler)
        self._before = {}
