"""What each logger makes of pictures, tables and settings: one registration a logger.

A logger that is not registered gets the numbers alone. To add one::

    @log_media.register
    def _(logger: MLFlowLogger, prefix, figures, table, step):
        for key, figure in figures.items():
            logger.experiment.log_figure(logger.run_id, figure, f"{prefix}/{key}_{step}.png")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Figures = Mapping[str, "Figure"]


def for_each(loggers: Iterable[Logger], log: Callable[[Logger], None]) -> None:
    """All loggers get their chance; the first error is raised afterwards."""
    errors = []
    for logger in loggers:
        try:
            log(logger)
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def check_source(name: str) -> None:
    """A ``ValueError`` for a source of a probe that cannot end the name of a curve."""
    if "/" in name:
        raise ValueError(f'source {name!r} of the probe must hold no "/": loggers take it for a folder.')


@singledispatch
def log_media(
    logger: Logger, prefix: str, figures: Figures, table: tuple[list[str], Sequence[Sequence[Any]]], step: int
) -> None:
    """Show figures, by name below ``prefix``, and a table (columns and rows) at a step."""


@log_media.register
def _(logger: WandbLogger, prefix: str, figures: Any, table: Any, step: int) -> None:
    for key, figure in figures.items():
        logger.log_image(f"{prefix}/{key}", [figure], step=step)
    logger.log_table(f"{prefix}/table", columns=table[0], data=table[1], step=step)


@log_media.register
def _(logger: TensorBoardLogger, prefix: str, figures: Any, table: Any, step: int) -> None:
    for key, figure in figures.items():
        logger.experiment.add_figure(f"{prefix}/{key}", figure, global_step=step)


@singledispatch
def describe(logger: Logger, name: str, settings: dict[str, Any], best: Literal["min", "max"]) -> None:
    """Tell a logger of a curve: its settings, and which of its values is best."""


@describe.register
def _(logger: WandbLogger, name: str, settings: dict[str, Any], best: str) -> None:
    """Settings in the run's config; its summary keeps the best value, plotted over optimizer steps."""
    logger.experiment.define_metric(name, summary=best, step_metric="trainer/global_step")
    logger.experiment.config.update({name: settings}, allow_val_change=True)


@singledispatch
def alert(logger: Logger, title: str, message: str) -> None:
    """Tell people of something that should not wait until they look."""


@alert.register
def _(logger: WandbLogger, title: str, message: str) -> None:
    logger.experiment.alert(title=title, text=message, level="WARN")


@singledispatch
def whereabouts(logger: Logger) -> list[str]:
    """Lines that tell a person where a logger's files lie."""
    return []


@whereabouts.register
def _(logger: CSVLogger) -> list[str]:
    return [f"numbers     {Path(logger.log_dir) / 'metrics.csv'}"]


@whereabouts.register
def _(logger: WandbLogger) -> list[str]:
    run = Path(logger.experiment.dir).parent
    return [f"W&B run     {run}", f"            upload it: wandb sync {run}"]


def save_figures(folder: Path, figures: Figures) -> None:
    """Write each as a PNG file, over the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, figure in figures.items():
        figure.savefig(folder / f"{key}.png")


def picture_folder(trainer: pl.Trainer, name: str = "mir") -> Path:
    """Where the PNG files of a run lie: beside the CSV log, or in the Trainer's ``default_root_dir``."""
    csv = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
    return Path(trainer.default_root_dir if csv is None else csv.log_dir) / f"{name}_media"
