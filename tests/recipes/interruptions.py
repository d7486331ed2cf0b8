"""Callbacks that end a run as clusters do; each strikes once in a folder."""

import os
import signal
from pathlib import Path

import lightning.pytorch as pl


class StruckAt(pl.Callback):
    """Send this process a signal after an optimizer step, the first time that the run gets there."""

    def __init__(self, step: int, signal_name: str) -> None:
        self.step = step
        self.signal_name = signal_name

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        marker = Path(trainer.default_root_dir) / f"struck_{self.step}"
        if trainer.global_step == self.step and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), getattr(signal, self.signal_name))
