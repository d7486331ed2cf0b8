"""A training loop as a probing callback sees it, and Lightning's."""

# ruff: noqa: D102  (what a loop does is said once, in its base)

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from torch import nn

from mir_lightning.callbacks import loggers
from mir_lightning.callbacks.strategies import forward_through_strategy
from mir_lightning.probing.network import Forward

T = TypeVar("T")
Table = tuple[list[str], Sequence[Sequence[Any]]]  # columns and rows
Drawing = tuple[loggers.Figures, Table]


class Loop(ABC):
    """What a probing callback asks of the loop it is in.

    Attributes:
        step: optimizer steps done.
        module: what is trained.
        ranks: number of processes that train together.
        first: whether this is the first of them.
        callbacks: what else is in the loop, probing callbacks as they are.
        shows_bars: whether the loop shows progress bars here.
        shows_pictures: whether one of its loggers shows them; PNG files are written in any case.
    """

    step: int
    module: nn.Module
    ranks: int
    first: bool
    callbacks: Sequence[Any]
    shows_bars: bool
    shows_pictures: bool

    @abstractmethod
    def from_first(self, value: T) -> T:
        """The first rank's value, on every rank."""

    @abstractmethod
    def all_agree(self, agrees: bool) -> bool:
        """Whether every rank does."""

    @abstractmethod
    def precision(self) -> AbstractContextManager[Any]:
        """Forwards inside run in the precision of training."""

    @abstractmethod
    def forward_of(self, vlm: nn.Module) -> Forward | None:
        """What runs ``vlm`` through the wrapper that shards it; ``None`` where it can be called itself."""

    @abstractmethod
    def monitor(self, values: Mapping[str, float]) -> None:
        """Let checkpoints and early stopping see the values."""

    @abstractmethod
    def log(self, values: dict[str, float]) -> None:
        """Give the values to every logger at this step."""

    @abstractmethod
    def log_media(self, name: str, figures: loggers.Figures, table: Table) -> None:
        """PNG files, which with a table go to every logger that shows them; for the first rank."""

    @abstractmethod
    def alert(self, title: str, message: str) -> None:
        """Let loggers that can tell people of something do so; the first rank does."""

    @abstractmethod
    def describe(self, name: str, settings: dict[str, Any], best: Literal["min", "max"]) -> None:
        """Tell loggers of a curve: its settings, and which of its values is best."""


class LightningLoop(Loop):
    """A Lightning Trainer's."""

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.trainer = trainer
        self.module = pl_module
        self.step = trainer.global_step
        self.ranks = trainer.world_size
        self.first = trainer.is_global_zero
        self.callbacks = trainer.callbacks  # type: ignore[attr-defined]
        bar = trainer.progress_bar_callback
        self.shows_bars = self.first and bar is not None and getattr(bar, "is_enabled", True)
        self.shows_pictures = any(map(loggers.shows_media, trainer.loggers))

    def from_first(self, value: T) -> T:
        return self.trainer.strategy.broadcast(value)

    def all_agree(self, agrees: bool) -> bool:
        return self.trainer.strategy.reduce_boolean_decision(agrees, all=True)

    def sum(self, value: int) -> int:
        """Over all ranks."""
        strategy = self.trainer.strategy
        return int(strategy.reduce(torch.tensor(value, device=strategy.root_device), reduce_op="sum"))

    def precision(self) -> AbstractContextManager[Any]:
        return self.trainer.precision_plugin.forward_context()

    def forward_of(self, vlm: nn.Module) -> Forward | None:
        return forward_through_strategy(self.trainer, self.trainer.lightning_module, vlm)

    def monitor(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.trainer.callback_metrics[name] = torch.tensor(value, device=self.trainer.strategy.root_device)

    def log(self, values: dict[str, float]) -> None:
        def log_and_save(logger: Any) -> None:
            logger.log_metrics(values, step=self.step)
            logger.save()

        loggers.for_each(self.trainer.loggers, log_and_save)

    def log_media(self, name: str, figures: loggers.Figures, table: Table) -> None:
        if getattr(self.trainer, "fast_dev_run", False) or self.trainer.barebones:
            return
        pictures = loggers.save_figures(loggers.picture_folder(self.trainer, name), figures)
        loggers.for_each(
            self.trainer.loggers,
            lambda logger: loggers.log_media(logger, f"{name}_media", pictures, table, self.step),
        )

    def alert(self, title: str, message: str) -> None:
        for logger in self.trainer.loggers if self.first else ():
            loggers.alert(logger, title, message)

    def describe(self, name: str, settings: dict[str, Any], best: Literal["min", "max"]) -> None:
        for logger in self.trainer.loggers if self.first else ():
            loggers.describe(logger, name, settings, best)
