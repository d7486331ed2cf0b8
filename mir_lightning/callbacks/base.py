"""What callbacks that look into the model in training have in common: when, at what cost, what if it fails."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from mir_lightning.callbacks import reporting
from mir_lightning.callbacks.budget import Budget
from mir_lightning.callbacks.schedule import Schedule, tokens_of
from mir_lightning.callbacks.strategies import check_data_parallel
from mir_lightning.functional.checks import check_choice

OnError = Literal["warn", "raise"]

_STATE_VERSION = 3


class ProbingCallback(pl.Callback, ABC):
    """Evaluate something fixed at points of a training run, and keep the curve.

    A subclass says what to evaluate (:meth:`_prepare`, :meth:`_measure`) and what to tell of a result
    (:meth:`_values`, :meth:`_point`, :meth:`_draw`).

    Args:
        schedule: when, besides start and end.
        at_start: before the first step.
        at_end: after the last step, if that step was not evaluated yet.
        name: of the curve, in loggers and checkpoints.
        on_error: what a failed evaluation does once training runs: ``"warn"`` or ``"raise"``.
        max_overhead: largest share of the training time that evaluations may take, start and end apart.
        strict_probe: raise, instead of warning, when a run resumes with a probe of other contents.

    Raises:
        ValueError: for an unknown option.
    """

    label: str
    """What is evaluated, in messages."""
    best: Literal["min", "max"]
    """Which of a curve's values is best."""

    def __init__(
        self,
        schedule: Schedule,
        at_start: bool,
        at_end: bool,
        name: str,
        on_error: OnError,
        max_overhead: float | None,
        strict_probe: bool,
    ) -> None:
        check_choice("on_error", on_error, OnError)
        self.schedule = schedule
        self.at_start = at_start
        self.at_end = at_end
        self.name = name
        self.on_error = on_error
        self.budget = Budget(max_overhead)
        self.strict_probe = strict_probe
        self.history: list[dict[str, Any]] = []
        self._fingerprint: str | None = None
        self._last_step: int | None = None
        self._stepped = 0
        self._tokens = 0
        self._tokens_of_step = 0
        self._restored_fingerprint: str | None = None
        self._last_monitored: dict[str, float] = {}
        self._warned: set[str] = set()
        self.evaluating_since: float | None = None  # on the monotonic clock, while it does

    @abstractmethod
    def _prepare(self, pl_module: pl.LightningModule) -> tuple[str, dict[str, Any]]:
        """Find the model and check the probe: its fingerprint, and settings to describe the run with."""

    @abstractmethod
    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """Evaluate; the result has ``seconds``."""

    @abstractmethod
    def _values(self, result: Any) -> dict[str, float]:
        """What loggers plot of a result, by name."""

    def _monitored(self, result: Any) -> dict[str, float]:
        """What ``trainer.callback_metrics`` gets of a result."""
        return self._values(result)

    @abstractmethod
    def _point(self, result: Any, step: int) -> dict[str, Any]:
        """What the history keeps of a result: plain numbers, with ``step`` and ``seconds``."""

    @abstractmethod
    def _draw(self, trainer: pl.Trainer, result: Any) -> None:
        """Pictures of a result and of the history."""

    def _warning(self) -> str | None:
        """Something about the history to warn of, once."""
        return None

    def _bar_title(self, trainer: pl.Trainer) -> str | None:
        """Of a bar of this evaluation, on rank 0 of a Trainer that shows bars."""
        bar = trainer.progress_bar_callback
        shown = trainer.is_global_zero and bar is not None and getattr(bar, "is_enabled", True)
        return f"{self.label} at step {trainer.global_step}" if shown else None

    @property
    def state_key(self) -> str:
        """Two callbacks of different names keep their own state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the model and check the probe, so that mistakes show before the first step."""
        check_data_parallel(trainer, type(self).__name__)
        self._fingerprint, settings = self._prepare(pl_module)
        self._check_fingerprint(trainer, self._fingerprint)
        reporting.describe_run(trainer, self.name, settings, self.best)

    def _check_fingerprint(self, trainer: pl.Trainer, fingerprint: str) -> None:
        same = trainer.strategy.broadcast(fingerprint) == fingerprint
        if not trainer.strategy.reduce_boolean_decision(same, all=True):
            raise ValueError("probe: the ranks hold probes of different contents; give every rank the same one.")
        restored = self._restored_fingerprint
        if restored is not None and restored != fingerprint:
            message = (
                f"probe: its fingerprint {fingerprint[:12]} is not that of the checkpoint, {restored[:12]}: the "
                f"points of the {self.name} curve before and after it are not comparable."
            )
            if self.strict_probe:
                raise ValueError(message)
            rank_zero_warn(message)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Step 0; on resume, the last point, and one that the interrupted run was due but did not reach."""
        self.budget.start()
        self._show_monitored(trainer)
        self._stepped = step = trainer.global_step
        if (self.at_start and step == 0) or (step and self.schedule.due_at_step(step)):
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate once after each optimizer step that is due (micro-batches of an accumulation share one)."""
        if self.schedule.every_n_tokens is not None:
            self._tokens_of_step += tokens_of(batch)
        before, self._stepped = self._stepped, trainer.global_step
        if self._stepped == before:
            return
        due = any(self.schedule.due_at_step(step) for step in range(before + 1, self._stepped + 1))
        if self.schedule.every_n_tokens is not None:
            due |= self._count_tokens(trainer)
        if due and self._affordable(trainer):
            self._evaluate(trainer, pl_module)

    def _count_tokens(self, trainer: pl.Trainer) -> bool:
        """Add a step's tokens over all ranks; whether that passed a point."""
        of_step = torch.tensor(self._tokens_of_step, device=trainer.strategy.root_device)
        before, self._tokens_of_step = self._tokens, 0
        self._tokens += int(trainer.strategy.reduce(of_step, reduce_op="sum"))
        return self.schedule.due_at_tokens(before, self._tokens)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate at the end of each epoch that is due."""
        if self.schedule.due_at_epoch(trainer.current_epoch + 1) and self._affordable(trainer):
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Last step."""
        if self.at_end:
            self._evaluate(trainer, pl_module)

    def _affordable(self, trainer: pl.Trainer) -> bool:
        """Whether one more evaluation like the last keeps within ``max_overhead``; rank 0 decides for all."""
        if self.budget.max_overhead is None or not self.history:
            return True
        coming = self.history[-1]["seconds"]
        affordable = bool(trainer.strategy.broadcast(self.budget.allows(coming)))
        if not affordable:
            rank_zero_info(self.budget.refusal(self.name, trainer.global_step, coming))
        return affordable

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        self.evaluating_since = start = time.monotonic()
        try:
            self._report(trainer, self._measure(trainer, pl_module))
        except Exception as error:
            if self.on_error == "raise":
                raise
            self._warn_once(
                f"{self.label} evaluation at step {step} failed, training goes on: {error}", str(error)
            )
        finally:
            self.evaluating_since = None
            self.budget.evaluating += time.monotonic() - start

    def _report(self, trainer: pl.Trainer, result: Any) -> None:
        step = trainer.global_step
        self._last_monitored = self._monitored(result)
        self._show_monitored(trainer)
        self.history.append(self._point(result, step))
        values = self._values(result)
        values[f"{self.name}_probe/seconds"] = result.seconds
        values[f"{self.name}_probe/overhead"] = self.budget.share(result.seconds)
        reports: list[Callable[[], None]] = [
            lambda: reporting.log_scalars(trainer, values),
            lambda: self._draw(trainer, result),
        ]
        for report in reports:
            try:
                report()
            except Exception as error:
                if self.on_error == "raise":
                    raise
                self._warn_once(f"{self.label} of step {step} could not be logged everywhere: {error}", str(error))
        if message := self._warning():
            self._warn_once(f"{self.name}: {message}", "history")

    def _show_monitored(self, trainer: pl.Trainer) -> None:
        """Let checkpoints, early stopping and plateau schedulers see the last point."""
        for name, value in self._last_monitored.items():
            trainer.callback_metrics[name] = torch.tensor(value, device=trainer.strategy.root_device)

    def _warn_once(self, message: str, cause: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            rank_zero_warn(message)

    def state_dict(self) -> dict[str, Any]:
        """The curve so far; plain numbers, loadable with ``weights_only``."""
        return {
            "version": _STATE_VERSION,
            "fingerprint": self._fingerprint,
            "last_step": self._last_step,
            "history": self.history,
            "monitored": self._last_monitored,
            "tokens": self._tokens,
            "train_seconds": self.budget.trained,
            "probe_seconds": self.budget.evaluating,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the curve of a checkpoint.

        Raises:
            ValueError: for the state of another version.
        """
        if state_dict.get("version") != _STATE_VERSION:
            raise ValueError(
                f"the checkpoint's {self.name} state has version {state_dict.get('version')}, this one reads "
                f"{_STATE_VERSION}: train on without it, or with the mir-lightning that wrote it."
            )
        self._last_step = state_dict["last_step"]
        self.history = list(state_dict["history"])
        self._last_monitored = dict(state_dict["monitored"])
        self._tokens = state_dict["tokens"]
        self.budget.restore(state_dict["train_seconds"], state_dict["probe_seconds"])
        self._restored_fingerprint = state_dict["fingerprint"]
