"""Callbacks that end a run as clusters do; each strikes once in a folder."""

import os
import signal
from pathlib import Path

import lightning.pytorch as pl

from mir_lightning.llava.data.source import Source


class StruckAt(pl.Callback):
    """Send this process a signal after an optimizer step, the first time that the run gets there.

    With ``within`` not right after it, but before the second of the next step's micro-batches.
    """

    def __init__(self, step: int, signal_name: str, within: bool = False) -> None:
        self.step = step
        self.signal_name = signal_name
        self.within = within

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self.within:
            self._strike(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.within and batch_idx % trainer.accumulate_grad_batches == 1:
            self._strike(trainer)

    def _strike(self, trainer):
        marker = Path(trainer.default_root_dir) / f"struck_{self.step}_{self.within}"
        if trainer.global_step == self.step and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), getattr(signal, self.signal_name))


class NoData(Source):
    """A source of one's own."""

    def split(self, held_out, scale, seed):
        return [], []
