"""What each logger makes of pictures, tables and settings: one registration a logger.

A logger that is not registered gets the numbers alone. To add one::

    @log_media.register
    def _(logger: MLFlowLogger, prefix, pictures, table, step):
        for key, file in pictures.items():
            logger.experiment.log_artifact(logger.run_id, str(file), f"{prefix}/{step}")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Figures = Mapping[str, "Figure"]
Pictures = Mapping[str, Path]


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
    logger: Logger, prefix: str, pictures: Pictures, table: tuple[list[str], Sequence[Sequence[Any]]], step: int
) -> None:
    """Show PNG files by name below ``prefix``, which the next point overwrites, and a table (columns, rows)."""


def shows_media(logger: Logger) -> bool:
    """Whether :func:`log_media` does anything for it."""
    return log_media.dispatch(type(logger)) is not log_media.dispatch(object)


@log_media.register
def _(logger: WandbLogger, prefix: str, pictures: Any, table: Any, step: int) -> None:
    for key, file in pictures.items():
        logger.log_image(f"{prefix}/{key}", [str(file)], step=step)
    logger.log_table(f"{prefix}/table", columns=table[0], data=table[1], step=step)


@log_media.register
def _(logger: TensorBoardLogger, prefix: str, pictures: Any, table: Any, step: int) -> None:
    from PIL import Image

    for key, file in pictures.items():
        pixels = np.asarray(Image.open(file).convert("RGB"))
        logger.experiment.add_image(f"{prefix}/{key}", pixels, global_step=step, dataformats="HWC")


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


def save_figures(folder: Path, figures: Figures) -> Pictures:
    """Write each as a PNG file, over the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {key: folder / f"{key}.png" for key in figures}
    for key, figure in figures.items():
        figure.savefig(files[key])
    return files


def picture_folder(trainer: pl.Trainer, name: str = "mir") -> Path:
    """Where the PNG files of a run lie: beside the CSV log, or in the Trainer's ``default_root_dir``."""
    csv = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
    return Path(trainer.default_root_dir if csv is None else csv.log_dir) / f"{name}_media"
