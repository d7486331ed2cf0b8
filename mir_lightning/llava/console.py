"""What a person sees in the terminal: tables, and the last MIR in the progress bar."""

from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from mir_lightning.callbacks.mir import MIRCallback
from mir_lightning.callbacks.reporting import picture_folder
from mir_lightning.llava.model.stages import Stage
from mir_lightning.vlm import PartName, parameters_of


class MIRProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the last MIR beside the loss."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Add ``mir`` to what the bar shows."""
        metrics: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        if "mir" in trainer.callback_metrics:
            metrics["mir"] = f"{trainer.callback_metrics['mir'].item():.3f}"
        return metrics


def start_table(trainer: Any, batch_size: int) -> str:
    """What a :class:`~mir_lightning.llava.trainer.RecipeTrainer` is about to do with batches of this size."""
    world, accumulated = trainer.world_size, trainer.accumulate_grad_batches
    divided = f"{batch_size} on each of {world} device(s), accumulated {accumulated} time(s)"
    return (
        f"precision  {trainer.precision}: {trainer.precision_reason}\n"
        f"batch      {divided}: {batch_size * world * accumulated} a step\n"
        f"folder     {trainer.default_root_dir}"
    )


def stage_table(vlm: PreTrainedModel, stage: Stage) -> str:
    """The stage as a person reads it: module, layers, parameters, trainable, learning rate, weight decay."""
    parts = {part.module: part for part in stage.train}
    rows = []
    for module in get_args(PartName):
        total, trainable = _count(vlm, module), 0
        row = ["-", "-", "-"]
        if part := parts.get(module):
            trainable = _count(vlm, module, part.layers)
            row = [part.layers or "all", f"{part.lr:g}", f"{part.weight_decay:g}"]
        if total:
            rows.append([module, row[0], f"{total:,}", f"{trainable:,}", *row[1:]])
    return _text(("module", "layers", "parameters", "trainable", "lr", "weight decay"), rows)


def _count(vlm: PreTrainedModel, module: PartName, layers: str | None = None) -> int:
    return sum(p.numel() for p in parameters_of(vlm, module, layers, required=False).values())


def _text(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as plain text: columns of numbers to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("module", "layers") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    written = StringIO()
    Console(file=written, width=200, color_system=None).print(table)
    return written.getvalue().rstrip()


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


def history_table(history: Iterable[Mapping[str, Any]]) -> str:
    """The curve as text: step, held-out loss, perplexity, MIR, and MIR by the robust rule."""
    keys = ("loss", "perplexity", "mir", "mir_robust")
    rows = [[str(p["step"]), *("-" if p[key] is None else f"{p[key]:.3f}" for key in keys)] for p in history]
    return _text(("step", "held-out loss", "perplexity", "MIR", "robust"), rows)
