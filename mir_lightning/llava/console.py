"""What a person sees in the terminal: the last MIR in the progress bar, and a closing table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from mir_lightning.callbacks.loggers import picture_folder
from mir_lightning.callbacks.mir import MIRCallback


class MIRProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the last MIR beside the loss."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Add ``mir`` to what the bar shows."""
        metrics: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        if "mir" in trainer.callback_metrics:
            metrics["mir"] = f"{trainer.callback_metrics['mir'].item():.3f}"
        return metrics


def start_table(trainer: pl.Trainer, reason: str, batch_size: int) -> str:
    """What a run is about to do; ``reason`` says why in this precision."""
    world, accumulated = trainer.world_size, trainer.accumulate_grad_batches
    return (
        f"precision  {trainer.precision}: {reason}\n"
        f"batch      {batch_size} on each of {world} device(s), accumulated {accumulated} time(s): "
        f"{batch_size * world * accumulated} a step\n"
        f"folder     {trainer.default_root_dir}"
    )


def history_table(history: Iterable[Mapping[str, Any]]) -> str:
    """The curve as text: step, held-out loss, perplexity, MIR, and MIR by the robust rule."""
    lines = [f"{'step':>8} {'held-out loss':>14} {'perplexity':>11} {'MIR':>7} {'robust':>7}"]
    for point in history:
        loss, perplexity = (
            "-" if point.get(key) is None else f"{point[key]:.3f}"
            for key in ("mir_probe/loss", "mir_probe/perplexity")
        )
        lines.append(
            f"{point['step']:>8} {loss:>14} {perplexity:>11} {point['mir']:>7.3f} {point['mir_robust']:>7.3f}"
        )
    return "\n".join(lines)


def closing_report(trainer: pl.Trainer, callback: MIRCallback, pictures: Iterable[Path], model: Path) -> str:
    """Table of the run and where everything lies."""
    lines = ["", history_table(callback.history), ""]
    folder = picture_folder(trainer, callback.name)
    for picture in (*pictures, folder / "layers.png", folder / "heatmap.png"):
        lines.append(f"picture     {picture}")
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            lines.append(f"numbers     {Path(logger.log_dir) / 'metrics.csv'}")
        elif isinstance(logger, WandbLogger):
            run = Path(logger.experiment.dir).parent
            lines += [f"W&B run     {run}", f"            upload it: wandb sync {run}"]
    return "\n".join([*lines, f"model       {model}", ""])
