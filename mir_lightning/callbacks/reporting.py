"""What evaluations look like in loggers: names of the scalars, tables and pictures."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from mir_lightning.functional.mir import norms_of, outlier_rules
from mir_lightning.probing.evaluate import MIRResult
from mir_lightning.report import Run, report_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

# Okabe and Ito: told apart with any colour vision.
_MEAN_COLOUR, _COV_COLOUR = "#0072B2", "#E69F00"


def scalars(result: MIRResult, name: str = "mir") -> dict[str, float]:
    """Everything a logger can plot, under the names every door uses."""
    tokens = torch.tensor([result.vision_tokens, result.text_tokens])
    values = {name: result.mir, f"{name}_robust": result.mir_robust}
    for reading, of_layers in (
        ("rank", result.effective_rank),
        ("outliers", result.outliers / tokens),
        ("massive", result.massive / tokens),
    ):
        vision, text = of_layers.mean(dim=0).tolist()
        values |= {f"{name}_{reading}/vision": vision, f"{name}_{reading}/text": text}
    if result.loss is not None and result.perplexity is not None:
        values |= {f"{name}_probe/loss": result.loss, f"{name}_probe/perplexity": result.perplexity}
    for layer, distance in enumerate(result.layers.tolist(), start=1):
        values[f"{name}_layers/layer_{layer:02d}"] = distance
    return values


def point(result: MIRResult, step: int) -> dict[str, Any]:
    """One point of a run's history: plain numbers, small enough for every checkpoint."""
    return {
        "step": step,
        "mir": result.mir,
        "mir_robust": result.mir_robust,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "seconds": result.seconds,
        "vision_rank": result.effective_rank[:, 0].mean().item(),
        "text_rank": result.effective_rank[:, 1].mean().item(),
        "vision_massive": (result.massive[:, 0] / result.vision_tokens).mean().item(),
        "layers": result.layers.tolist(),
    }


def logged_point(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A point of the history from what :func:`scalars` gave a logger, and its step."""
    prefix = f"{name}_layers/layer_"
    return {
        "step": values["step"],
        "mir": values[name],
        "mir_robust": values[f"{name}_robust"],
        "loss": values.get(f"{name}_probe/loss"),
        "perplexity": values.get(f"{name}_probe/perplexity"),
        "seconds": values[f"{name}_probe/seconds"],
        "vision_rank": values[f"{name}_rank/vision"],
        "text_rank": values[f"{name}_rank/text"],
        "vision_massive": values[f"{name}_massive/vision"],
        "layers": [values[key] for key in sorted(values, key=lambda k: (len(k), k)) if key.startswith(prefix)],
    }


def collapse_warning(history: Sequence[Mapping[str, Any]]) -> str | None:
    """What to tell of a MIR below its first value whose vision tokens have lost half their effective rank."""
    first, last = history[0], history[-1]
    if last["mir"] >= first["mir"] or last["vision_rank"] >= first["vision_rank"] / 2:
        return None
    return (
        f"MIR fell from {first['mir']:.3f} to {last['mir']:.3f} by step {last['step']}, but the effective rank of "
        f"the vision tokens fell too, from {first['vision_rank']:.1f} to {last['vision_rank']:.1f}: this may be "
        "collapse, not alignment."
    )


def layer_figure(result: MIRResult | Mapping[str, Any], title: str) -> Figure:
    """Fréchet distance by layer, split into mean gap and covariance gap, of a result or its plain form."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure()
    axes = figure.subplots()
    parts = result if isinstance(result, Mapping) else vars(result)
    mean_gap, cov_gap = parts["mean_gap"], parts["cov_gap"]
    layers = range(1, len(mean_gap) + 1)
    axes.bar(layers, mean_gap, color=_MEAN_COLOUR, label="mean gap", width=0.85)
    axes.bar(layers, cov_gap, bottom=mean_gap, color=_COV_COLOUR, label="covariance gap", width=0.85)
    axes.set(xlabel="decoder layer", ylabel="Fréchet distance", title=title, xlim=(0.4, len(mean_gap) + 0.6))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def layer_comparison_figure(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Fréchet distance by layer of several models, by name."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure()
    axes = figure.subplots()
    for (name, layers), marker in zip(curves.items(), itertools.cycle("os^Dv<>P")):
        axes.plot(range(1, len(layers) + 1), layers, marker=marker, markersize=4, linewidth=1.2, label=name)
    if all(value > 0 for layers in curves.values() for value in layers):
        axes.set_yscale("log")
    axes.set(xlabel="decoder layer", ylabel="Fréchet distance")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(handles=axes.lines, frameon=False)  # names that begin with "_" too
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


def token_figure(result: MIRResult, step: int) -> Figure:
    """Vision and text tokens of one layer on the first two principal components of both; without outliers."""
    norms = [norms_of(part) for part in result.sample]
    kept = [part[outlier_rules(n).inliers(n, "robust")] for part, n in zip(result.sample, norms, strict=True)]
    tokens = torch.cat(kept)
    centred = tokens - tokens.mean(dim=0)
    _, deviations, directions = torch.linalg.svd(centred, full_matrices=False)
    plane = (centred @ directions[:2].T).numpy()
    shares = (deviations.square() / deviations.square().sum().clamp(min=1e-300))[:2].tolist()
    figure = _figure()
    axes = figure.subplots()
    vision = len(kept[0])
    for part, colour, marker, label in (
        (plane[:vision], _MEAN_COLOUR, "o", "vision tokens"),
        (plane[vision:], _COV_COLOUR, "^", "text tokens"),
    ):
        axes.scatter(
            part[:, 0], part[:, -1], s=9, alpha=0.6, linewidths=0, color=colour, marker=marker, label=label
        )
    axes.set(
        xlabel=f"first component ({shares[0]:.0%} of the variance)",
        ylabel=f"second component ({shares[-1]:.0%})",
        title=f"Step {step}: tokens after layer {result.sample_layer} of {len(result.layers)}",
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def curve_figure(history: Sequence[Mapping[str, Any]]) -> Figure:
    """A run at a glance: MIR, held-out loss and effective ranks over optimizer steps, as a report draws them."""
    keys = {"mir": "mir", "mir_robust": "mir_robust", "mir_probe/loss": "loss"}
    keys |= {"mir_rank/vision": "vision_rank", "mir_rank/text": "text_rank"}
    curves = {name: [(p["step"], p[key]) for p in history if p[key] is not None] for name, key in keys.items()}
    return report_figure([Run("", {name: curve for name, curve in curves.items() if curve})])


def ability_figure(steps: Sequence[int], scores: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Soft Discrimination Score by ability over steps, and the chance level of each.

    Args:
        steps: optimizer steps.
        scores: by ability, at each step the score and its chance level.
    """
    figure = _figure()
    axes = figure.subplots()
    for index, (ability, points) in enumerate(scores.items()):
        colour = f"C{index}"
        axes.plot(steps, [point[0] for point in points], "o-", color=colour, label=ability)
        axes.plot(steps, [point[1] for point in points], ":", color=colour, label=f"{ability}: chance")
    axes.set(
        xlabel="optimizer step", ylabel="Soft Discrimination Score", title="Right answers against distractors"
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def caption_figure(
    images: Sequence[Image], captions: Sequence[str], references: Sequence[str], step: int
) -> Figure:
    """Pictures with what the model writes about each, and in grey the reference."""
    figure = _figure()
    figure.set_size_inches(2.6 * len(images), 4.0)
    panels = figure.subplots(2, len(images), squeeze=False, height_ratios=(2, 1))
    texts = zip(captions, references, strict=True)
    for picture, below, image, (caption, reference) in zip(*panels, images, texts, strict=True):
        picture.imshow(image)
        picture.set(xticks=[], yticks=[])
        below.set_axis_off()
        lines = textwrap.wrap(caption.strip() or "(nothing)", 34, max_lines=5)
        grey = textwrap.wrap(reference, 34, max_lines=4)
        below.text(0, 1, "\n".join(lines), va="top", fontsize=8, parse_math=False)
        place = 0.86 - 0.14 * len(lines)
        below.text(0, place, "\n".join(grey), va="top", fontsize=8, color="#767676", parse_math=False)
    figure.suptitle(f"Step {step}: captions written by the model; in grey, the reference", fontsize=10)
    return figure


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "mir-lightning[recipes]"') from error
    return Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")


def log_scalars(trainer: pl.Trainer, values: dict[str, float]) -> None:
    """Give ``values`` to every logger at the Trainer's optimizer step, and write them out at once."""
    _for_each_logger(trainer, lambda logger: _log_and_save(logger, values, trainer.global_step))


def _log_and_save(logger: Logger, values: dict[str, float], step: int) -> None:
    logger.log_metrics(values, step=step)
    logger.save()


def _for_each_logger(trainer: pl.Trainer, log: Callable[[Logger], None]) -> None:
    """All loggers get their chance; the first error is raised afterwards."""
    errors = []
    for logger in trainer.loggers:
        try:
            log(logger)
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def describe_run(trainer: pl.Trainer, name: str, settings: dict[str, Any], best: Literal["min", "max"]) -> None:
    """W&B: settings in the run's config; its summary keeps the best value, plotted over optimizer steps."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.define_metric(name, summary=best, step_metric="trainer/global_step")
            logger.experiment.config.update({name: settings}, allow_val_change=True)


def log_pictures(trainer: pl.Trainer, name: str, result: MIRResult, history: Sequence[Mapping[str, Any]]) -> None:
    """Pictures of a MIR evaluation, see :func:`log_figures`, and a table of the layers."""
    if not trainer.is_global_zero:
        return
    step = trainer.global_step
    columns, rows = layer_table(vars(result))
    table = ["step", *columns], [[step, *row] for row in rows]
    log_figures(trainer, name, pictures(result, step, history), table)


def pictures(result: MIRResult, step: int, history: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Everything to look at, by name; ``history`` ends with this result's point."""
    return {
        "layers": layer_figure(result, f"Step {step}: MIR {result.mir:.3f}"),
        "heatmap": heatmap_figure([p["step"] for p in history], [p["layers"] for p in history]),
        "tokens": token_figure(result, step),
    }


def save_pictures(folder: Path, figures: Mapping[str, Figure]) -> None:
    """Write each as a PNG file, over the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, figure in figures.items():
        figure.savefig(folder / f"{key}.png")


def log_figures(
    trainer: pl.Trainer, name: str, figures: Mapping[str, Figure], table: tuple[list[str], list[list[Any]]]
) -> None:
    """Pictures to W&B and TensorBoard under ``<name>_media/``, and as PNG files beside the CSV log.

    W&B also gets the table (columns and rows). Without a CSV logger the files go to the Trainer's
    ``default_root_dir``. For rank 0.
    """
    save_pictures(picture_folder(trainer, name), figures)
    step = trainer.global_step
    _for_each_logger(trainer, lambda logger: _log_media(logger, f"{name}_media", figures, table, step))


def _log_media(
    logger: Logger,
    prefix: str,
    figures: Mapping[str, Figure],
    table: tuple[list[str], list[list[Any]]],
    step: int,
) -> None:
    if isinstance(logger, WandbLogger):
        for key, figure in figures.items():
            logger.log_image(f"{prefix}/{key}", [figure], step=step)
        columns, rows = table
        logger.log_table(f"{prefix}/table", columns=columns, data=rows, step=step)
    elif isinstance(logger, TensorBoardLogger):
        for key, figure in figures.items():
            logger.experiment.add_figure(f"{prefix}/{key}", figure, global_step=step)


def layer_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of all that is known by layer, from the fields of a result."""
    columns = ["layer", "distance", "mean gap", "covariance gap", "vision rank", "text rank"]
    columns += ["vision outliers", "text outliers", "robust distance", "vision massive", "text massive"]
    keys = ("layers", "mean_gap", "cov_gap", "effective_rank", "outliers", "robust_layers", "massive")
    numbers = [torch.as_tensor(result[key]).reshape(len(result["layers"]), -1) for key in keys]
    return columns, [[layer, *row] for layer, row in enumerate(torch.cat(numbers, dim=1).tolist(), start=1)]


def picture_folder(trainer: pl.Trainer, name: str = "mir") -> Path:
    """Where the PNG files of a run lie."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            return Path(logger.log_dir) / f"{name}_media"
    return Path(trainer.default_root_dir) / f"{name}_media"
