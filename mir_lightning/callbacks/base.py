"""Evaluate something fixed at points of a training run, and keep the curve: what every probing callback shares."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from mir_lightning.callbacks import alarms
from mir_lightning.callbacks.loops import Drawing, LightningLoop, Loop
from mir_lightning.callbacks.schedule import Budget, Schedule, tokens_of
from mir_lightning.callbacks.strategies import check_data_parallel
from mir_lightning.functional.checks import check_choice
from mir_lightning.probing.probe import Probe
from mir_lightning.vlm import find_entrance

OnError = Literal["warn", "raise"]

_STATE_VERSION = 4
_SECONDS_OF_FILES = 60.0  # how old the PNG files may grow where no logger shows pictures
_NO_POINT: dict[str, Any] = {
    **{"history": [], "monitored": {}, "last_step": None},
    **{"tokens": 0, "train_seconds": 0.0, "probe_seconds": 0.0},
}


class ProbingCallback(pl.Callback, ABC):
    """Evaluate something fixed at points of a training run, and keep the curve.

    Nothing is asked of the LightningModule but that it holds the model. The run is the same bit for bit with and
    without the callback. Distributed, each rank runs its share of what is evaluated, and all log and see the
    numbers of the whole: give every rank the same. Each evaluation also logs ``<name>_probe/seconds`` and
    ``<name>_probe/overhead`` (share of the training time so far).

    A subclass says what evaluates (:attr:`evaluator`, :meth:`make_probe`) and what to tell of a result
    (:meth:`values`, :meth:`draw`).

    Args:
        probe: what is evaluated, or a zero-argument callable that makes it when the fit starts.
        every_n_steps: optimizer steps between evaluations; ``None`` for none. The schedules below add to it.
        at_start: evaluate before the first step.
        at_end: evaluate after the last step, if that step was not evaluated yet. Every point is of the weights
            that are trained: averaged ones (EMA, SWA) take their place after it.
        model: dotted path of the Hugging Face model inside the LightningModule; found by itself when None.
        name: prefix of everything logged; choose another for a second callback of the kind.
        on_error: what a failed evaluation does once training runs: ``"warn"`` reports it with the step and
            training goes on; ``"raise"`` stops. What can be checked at the start always raises.
        at_steps: also evaluate after these optimizer steps.
        growth: also evaluate after 1, 2, ... steps, each point about ``growth`` times the last: for long runs.
        every_n_epochs: also evaluate at the end of every so many training epochs.
        every_n_tokens: also evaluate whenever so many more tokens (over all ranks, padding left out) have been
            trained on. Needs ``attention_mask`` or ``input_ids`` in the training batches, and adds up one number
            across ranks a step.
        max_overhead: largest share of the training time that evaluations may take, start and end apart. One
            that would exceed it is left out, and the log says so.
        strict_probe: raise, instead of warning, when a run resumes with a probe of other contents.

    Attributes:
        engine: options of the evaluator.
        network: what is evaluated, once the fit has started.
        history: one row a point: ``step``, and everything that was logged, under the names it was logged under.
        settings: what points are comparable by, once training has begun: of the probe, its fingerprint.
        siblings: all probing callbacks of the loop, this one too, once the fit has started.
        last_monitored: the last values that checkpoints and early stopping saw.
        evaluating_since: when the evaluation under way began, on the monotonic clock; ``None`` between them.

    Raises:
        ValueError: for an unknown option or an interval below 1; when the fit starts, for a probe or a module
            that does not fit, ranks with different probes, or tensor parallelism.
    """

    label: str
    """What is evaluated, in messages."""
    best: Literal["min", "max"]
    """Which of a curve's values is best."""
    evaluator: Callable[..., Any]
    """Called with the model, the probe, :attr:`engine` and ``forward=``, ``distributed=``, ``progress=``; see
    :func:`~mir_lightning.evaluate_mir`. Its result has ``seconds``."""

    def __init__(
        self,
        probe: Any,
        every_n_steps: int | None = 500,
        at_start: bool = True,
        at_end: bool = True,
        model: str | None = None,
        name: str = "probe",
        on_error: OnError = "warn",
        at_steps: Sequence[int] = (),
        growth: float | None = None,
        every_n_epochs: int | None = None,
        every_n_tokens: int | None = None,
        max_overhead: float | None = None,
        strict_probe: bool = False,
    ) -> None:
        check_choice("on_error", on_error, OnError)
        self.probe = probe
        self.engine: dict[str, Any] = {}
        self.network: nn.Module | None = None
        self.schedule = Schedule(every_n_steps, tuple(at_steps), growth, every_n_epochs, every_n_tokens)
        self.budget = Budget(max_overhead)
        self.at_start = at_start
        self.at_end = at_end
        self.model = model
        self.name = name
        self.on_error = on_error
        self.strict_probe = strict_probe
        self.history: list[dict[str, Any]] = []
        self.evaluating_since: float | None = None
        self.settings: dict[str, Any] = {}
        self.siblings: list[ProbingCallback] = [self]
        self._restored: dict[str, Any] | None = None
        self._last_step: int | None = None
        self._stepped = 0
        self._tokens = 0
        self._tokens_of_step = 0
        self.last_monitored: dict[str, float] = {}
        self._warned: set[str] = set()
        self._drawn_at = 0.0
        self._undrawn: tuple[Any, int] | None = None

    @property
    def last_seconds(self) -> float | None:
        """What the last evaluation took; ``None`` before the first."""
        return self.history[-1][f"{self.name}_probe/seconds"] if self.history else None

    def make_probe(self, source: Any) -> Any:
        """The probe from what the callback was given; it has a ``fingerprint``."""
        return Probe.of(source)

    def prepare(self, module: nn.Module) -> dict[str, Any]:
        """Find the model in ``module`` and make the probe; settings to describe the run with."""
        self.network = find_entrance(module, self.model)
        self.probe = self.make_probe(self.probe)
        return {key: value for key, value in self.engine.items() if key != "batch_size"}

    def measure(self, loop: Loop) -> Any:
        """Evaluate as the loop trains."""
        assert self.network is not None
        with loop.precision():
            return type(self).evaluator(
                self.network,
                self.probe,
                forward=loop.forward_of(self.network),
                distributed=loop.ranks > 1,
                progress=f"{self.label} at step {loop.step}" if loop.shows_bars else None,
                **self.engine,
            )

    @abstractmethod
    def values(self, result: Any) -> dict[str, float]:
        """What loggers plot of a result, by name."""

    def monitored(self, result: Any) -> dict[str, float]:
        """What checkpoints and early stopping see of a result."""
        return self.values(result)

    def remembered(self, result: Any) -> dict[str, Any]:
        """What the history keeps beside the values: plain data."""
        return {}

    def draw(self, result: Any, step: int) -> Drawing | None:
        """Figures by name, and a table, of a result and of the history, which ends with its row."""
        return None

    def readings(self, row: Mapping[str, Any]) -> dict[str, float]:
        """What :mod:`~mir_lightning.callbacks.alarms` look at, of a row of the history, by the names there."""
        return {}

    def begin(self, loop: Loop) -> None:
        """Find the model and check the probe, so that mistakes show before the first step."""
        with isolate_rng():  # a DataLoader draws when it is read
            settings = self.prepare(loop.module)
        self.settings = {"fingerprint": str(self.probe.fingerprint), **settings}
        if not loop.all_agree(loop.from_first(self.settings) == self.settings):
            raise ValueError("probe: the ranks hold probes of different contents; give every rank the same one.")
        restored, self._restored = self._restored, None
        if restored is None and loop.step == 0:  # another run, of a callback that was in one before
            self.load_state_dict({**self.state_dict(), **_NO_POINT})
            self._restored = None
        for key, before in (restored or {}).items():
            if (now := self.settings.get(key)) != before:
                message = (
                    f"probe: its {key} {str(now)[:12]} is not that of the checkpoint, {str(before)[:12]}: the "
                    f"points of the {self.name} curve before and after it are not comparable."
                )
                if self.strict_probe:
                    raise ValueError(message)
                rank_zero_warn(message)
        self.siblings = [callback for callback in loop.callbacks if isinstance(callback, ProbingCallback)]
        loop.describe(self.name, self.settings, self.best)

    def start(self, loop: Loop) -> None:
        """Step 0; on resume, the last point, and one that the interrupted run was due but did not reach."""
        self.budget.start()
        self._drawn_at, self._undrawn = time.monotonic(), None
        loop.monitor(self.last_monitored)
        self._stepped = step = loop.step
        if (self.at_start and step == 0) or (step and self.schedule.due_at_step(step)):
            self.evaluate(loop)

    def after_step(self, loop: Loop, tokens: int | None = None) -> None:
        """Evaluate if an optimizer step since the last call, or all ``tokens`` trained on so far, make it due."""
        before, self._stepped = self._stepped, loop.step
        due = any(self.schedule.due_at_step(step) for step in range(before + 1, self._stepped + 1))
        if tokens is not None:
            due |= self.schedule.due_at_tokens(self._tokens, tokens)
            self._tokens = tokens
        if due and self._affordable(loop):
            self.evaluate(loop)

    def after_epoch(self, loop: Loop, epochs: int) -> None:
        """Evaluate at the end of training epoch number ``epochs`` if that is due."""
        if self.schedule.due_at_epoch(epochs) and self._affordable(loop):
            self.evaluate(loop)

    def end(self, loop: Loop) -> None:
        """Last step."""
        if self.at_end:
            self.evaluate(loop)
        if self._undrawn is not None:
            self._try(loop, partial(self._draw, loop, *self._undrawn))

    def _affordable(self, loop: Loop) -> bool:
        """Whether one more evaluation like the last keeps within ``max_overhead``; the first rank decides."""
        if self.budget.max_overhead is None or self.last_seconds is None:
            return True
        refusal = loop.from_first(self.budget.refusal(self.last_seconds))
        if refusal is not None:
            rank_zero_info(f"{self.name}: evaluation at step {loop.step} left out: {refusal}.")
        return refusal is None

    def evaluate(self, loop: Loop) -> None:
        """Take a point at this step, unless it has one."""
        if loop.step == self._last_step:
            return
        self._last_step = loop.step
        self.evaluating_since = start = time.monotonic()
        try:
            self._report(loop, self.measure(loop))
        except Exception as error:
            self._warn_or_raise(
                f"{self.label} evaluation at step {loop.step} failed, training goes on: {error}", error
            )
        finally:
            self.evaluating_since = None
            self.budget.evaluating += time.monotonic() - start

    def _report(self, loop: Loop, result: Any) -> None:
        self.last_monitored = self.monitored(result)
        loop.monitor(self.last_monitored)
        values = self.values(result)
        values[f"{self.name}_probe/seconds"] = result.seconds
        values[f"{self.name}_probe/overhead"] = self.budget.share(result.seconds)
        self.history.append({"step": loop.step, **values, **self.remembered(result)})
        for alarm in (found := self._alarms()):
            rank_zero_warn(f"{self.name}: {alarm.message}")
            values[f"{self.name}_alarms/{alarm.name}"] = self.history[-1][f"{self.name}_alarms/{alarm.name}"] = 1.0
        self._try(loop, partial(loop.log, values))
        self._undrawn = (result, loop.step)
        if loop.shows_pictures or time.monotonic() - self._drawn_at >= _SECONDS_OF_FILES:
            self._try(loop, partial(self._draw, loop, result, loop.step))
        for alarm in found:
            self._try(loop, partial(loop.alert, f"{self.name}: {alarm.name}", alarm.message))

    def _try(self, loop: Loop, report: Callable[[], None]) -> None:
        try:
            report()
        except Exception as error:
            self._warn_or_raise(f"{self.label} of step {loop.step} could not be logged everywhere: {error}", error)

    def points(self) -> list[dict[str, float]]:
        """The readings of all probing callbacks of the loop, by step."""
        return alarms.points_of([(row["step"], c.readings(row)) for row in c.history] for c in self.siblings)

    def _alarms(self) -> list[alarms.Alarm]:
        """What the last row raises, each kind once in a run, whichever of the callbacks sees it first."""
        before = {key.partition("_alarms/")[2] for c in self.siblings for row in c.history for key in row}
        return [alarm for alarm in alarms.raised(self.points()) if alarm.name not in before]

    def _draw(self, loop: Loop, result: Any, step: int) -> None:
        self._drawn_at, self._undrawn = time.monotonic(), None
        if loop.first and (drawn := self.draw(result, step)) is not None:
            loop.log_media(self.name, *drawn)

    def _warn_or_raise(self, message: str, error: Exception) -> None:
        if self.on_error == "raise":
            raise error
        self.warn_once(message, str(error))

    def warn_once(self, message: str, cause: str) -> None:
        """Warn on the first rank, once for each ``cause``."""
        if cause not in self._warned:
            self._warned.add(cause)
            rank_zero_warn(message)

    # Lightning's hooks

    @property
    def state_key(self) -> str:
        """Two callbacks of different names keep their own state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Come before callbacks that put averaged weights in the place of the trained ones."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averaging = [c for c in callbacks if isinstance(c, (WeightAveraging, StochasticWeightAveraging))]
        if averaging and callbacks.index(averaging[0]) < callbacks.index(self):
            others = [c for c in callbacks if c is not self]  # a new list: Lightning is in the middle of this one
            others.insert(others.index(averaging[0]), self)
            trainer.callbacks = others  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """:meth:`begin`."""
        check_data_parallel(trainer, type(self).__name__)
        self.begin(LightningLoop(trainer, pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """:meth:`start`."""
        self.start(LightningLoop(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """:meth:`after_step`, once after each optimizer step (micro-batches of an accumulation share one)."""
        counts = self.schedule.every_n_tokens is not None
        self._tokens_of_step += tokens_of(batch) if counts else 0
        if trainer.global_step == self._stepped:
            return
        loop = LightningLoop(trainer, pl_module)
        tokens = self._tokens + loop.sum(self._tokens_of_step) if counts else None
        self._tokens_of_step = 0
        self.after_step(loop, tokens)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """:meth:`after_epoch`."""
        self.after_epoch(LightningLoop(trainer, pl_module), trainer.current_epoch + 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """:meth:`end`."""
        self.end(LightningLoop(trainer, pl_module))

    def state_dict(self) -> dict[str, Any]:
        """The curve so far; plain numbers, loadable with ``weights_only``."""
        return {
            "version": _STATE_VERSION,
            "settings": self.settings,
            "last_step": self._last_step,
            "history": self.history,
            "monitored": self.last_monitored,
            "tokens": self._tokens,
            "train_seconds": self.budget.trained,
            "probe_seconds": self.budget.evaluating,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the curve of a checkpoint; a ``ValueError`` for the state of another version."""
        if state_dict.get("version") != _STATE_VERSION:
            raise ValueError(
                f"the checkpoint's {self.name} state has version {state_dict.get('version')}, this one reads "
                f"{_STATE_VERSION}: train on without it, or with the mir-lightning that wrote it."
            )
        self._last_step = state_dict["last_step"]
        self.history = list(state_dict["history"])
        self.last_monitored = dict(state_dict["monitored"])
        self._tokens = state_dict["tokens"]
        self.budget.restore(state_dict["train_seconds"], state_dict["probe_seconds"])
        self._restored = dict(state_dict["settings"])
