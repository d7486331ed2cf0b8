"""What a person sees in the terminal: tables, and the last MIR in the progress bar."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from transformers import PreTrainedModel

from mir_lightning.callbacks.loggers import picture_folder, whereabouts
from mir_lightning.callbacks.mir import MIRCallback
from mir_lightning.llava.model.stages import Stage
from mir_lightning.llava.trainer import probing_callbacks
from mir_lightning.page import text_table
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
            row = [part.layers or "all", f"{part.lr:g}", f"{part.weight_decay or 0:g}"]
        if total:
            rows.append([module, row[0], f"{total:,}", f"{trainable:,}", *row[1:]])
    return text_table(("module", "layers", "parameters", "trainable", "lr", "weight decay"), rows)


def _count(vlm: PreTrainedModel, module: PartName, layers: str | None = None) -> int:
    return sum(p.numel() for p in parameters_of(vlm, module, layers, required=False).values())


def closing_report(trainer: pl.Trainer, callback: MIRCallback, pictures: Iterable[Path], model: Path) -> str:
    """Table of the run and where everything lies."""
    points = {point["step"]: dict(point) for point in callback.history}
    for point in itertools.chain(*(other.history for other in probing_callbacks(trainer))):
        points.get(point["step"], {}).update(point)
    lines = ["", history_table(points.values()), ""]
    folder = picture_folder(trainer, callback.name)
    for picture in (folder / "overview.png", *pictures, folder / "heatmap.png"):
        lines.append(f"picture     {picture}")
    lines += [line for logger in trainer.loggers for line in whereabouts(logger)]
    return "\n".join([*lines, f"model       {model}", ""])


def history_table(history: Iterable[Mapping[str, Any]]) -> str:
    """The curve as text: step, held-out loss, perplexity, MIR by both rules, image gain and its standard error."""
    keys = ("mir_probe/loss", "mir_probe/perplexity", "mir", "mir_robust", "image_gain", "image_gain_se")
    rows = [[str(p["step"]), *(f"{p[key]:.3f}" if key in p else "-" for key in keys)] for p in history]
    return text_table(("step", "held-out loss", "perplexity", "MIR", "robust", "image gain", "error"), rows)
