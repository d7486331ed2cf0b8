"""What a MIR evaluation looks like in loggers: names of the scalars, and two pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from mir_lightning.probing.evaluate import MIRResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito: told apart with any colour vision.
_MEAN_COLOUR, _COV_COLOUR, _LOSS_COLOUR = "#0072B2", "#E69F00", "#009E73"


def scalars(result: MIRResult, name: str = "mir") -> dict[str, float]:
    """Everything a logger can plot, under the names every door uses."""
    rank = result.effective_rank.mean(dim=0)
    values = {
        name: result.mir,
        f"{name}_rank/vision": rank[0].item(),
        f"{name}_rank/text": rank[1].item(),
        f"{name}_probe/seconds": result.seconds,
    }
    if result.loss is not None and result.perplexity is not None:
        values |= {f"{name}_probe/loss": result.loss, f"{name}_probe/perplexity": result.perplexity}
    for layer, distance in enumerate(result.layers.tolist(), start=1):
        values[f"{name}_layers/layer_{layer:02d}"] = distance
    return values


def layer_figure(result: MIRResult, step: int) -> Figure:
    """Fréchet distance by layer, split into mean gap and covariance gap."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure()
    axes = figure.subplots()
    layers = range(1, len(result.layers) + 1)
    axes.bar(layers, result.mean_gap, color=_MEAN_COLOUR, label="mean gap", width=0.85)
    axes.bar(layers, result.cov_gap, bottom=result.mean_gap, color=_COV_COLOUR, label="covariance gap", width=0.85)
    axes.set(
        xlabel="decoder layer",
        ylabel="Fréchet distance",
        title=f"Step {step}: MIR {result.mir:.3f}",
        xlim=(0.4, len(result.layers) + 0.6),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def heatmap_figure(steps: Sequence[int], layers: Sequence[Sequence[float]]) -> Figure:
    """Fréchet distance by layer and step: where in the model alignment happens, and when."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    figure = _figure()
    axes = figure.subplots()
    columns = list(zip(*layers, strict=True))
    positive = [value for row in columns for value in row if value > 0]
    norm = LogNorm(min(positive), max(positive)) if positive and min(positive) < max(positive) else None
    image = axes.imshow(
        columns,
        aspect="auto",
        origin="lower",
        norm=norm,
        interpolation="nearest",
        extent=(-0.5, len(steps) - 0.5, 0.5, len(columns) + 0.5),
    )
    shown = range(0, len(steps), max(1, -(-len(steps) // 10)))
    axes.set_xticks(list(shown), [str(steps[i]) for i in shown])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="optimizer step", ylabel="decoder layer", title="Fréchet distance of vision and text")
    figure.colorbar(image, label="Fréchet distance")
    return figure


def curve_figure(history: Sequence[Mapping[str, Any]]) -> Figure:
    """A run at a glance: MIR, held-out loss and effective ranks over optimizer steps."""
    figure = _figure()
    figure.set_size_inches(10, 3)
    steps = [point["step"] for point in history]
    panels = figure.subplots(1, 3)
    panels[0].plot(steps, [point["mir"] for point in history], "o-", color="black")
    panels[0].set_title("Modality Integration Rate")
    panels[0].set_ylabel("MIR (lower: better aligned)")
    if all(point["loss"] is not None for point in history):
        panels[1].plot(steps, [point["loss"] for point in history], "o-", color=_LOSS_COLOUR)
    panels[1].set_title("Held-out caption loss")
    panels[1].set_ylabel("cross-entropy (nats per token)")
    panels[2].plot(steps, [point["vision_rank"] for point in history], "o-", color=_MEAN_COLOUR, label="vision")
    panels[2].plot(steps, [point["text_rank"] for point in history], "s--", color=_COV_COLOUR, label="text")
    panels[2].set_title("Effective rank")
    panels[2].set_ylabel("dimensions (mean over layers)")
    panels[2].legend(frameon=False)
    for axes in panels:
        axes.set_xlabel("optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "mir-lightning[recipes]"') from error
    return Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")


def log_scalars(trainer: pl.Trainer, values: dict[str, float]) -> None:
    """Give ``values`` to every logger at the Trainer's optimizer step, and write them out at once."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)
        logger.save()


def define_wandb_metric(trainer: pl.Trainer, name: str) -> None:
    """W&B: the run's summary keeps the lowest MIR, plotted over optimizer steps."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.define_metric(name, summary="min", step_metric="trainer/global_step")


def log_pictures(trainer: pl.Trainer, name: str, figures: dict[str, Figure]) -> None:
    """Pictures to W&B and TensorBoard under ``<name>_media/``, and as PNG files beside the CSV log.

    Without a CSV logger the files go to the Trainer's ``default_root_dir``.
    """
    folder = picture_folder(trainer, name)
    folder.mkdir(parents=True, exist_ok=True)
    for key, figure in figures.items():
        figure.savefig(folder / f"{key}.png")
        for logger in trainer.loggers:
            _log_picture(logger, f"{name}_media/{key}", figure, trainer.global_step)


def _log_picture(logger: Logger, key: str, figure: Figure, step: int) -> None:
    if isinstance(logger, WandbLogger):
        logger.log_image(key, [figure], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(key, figure, global_step=step)


def picture_folder(trainer: pl.Trainer, name: str = "mir") -> Path:
    """Where the PNG files of a run lie."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            return Path(logger.log_dir) / f"{name}_media"
    return Path(trainer.default_root_dir) / f"{name}_media"
