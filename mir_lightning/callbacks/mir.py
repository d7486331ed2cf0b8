"""``MIRCallback``: MIR curves of a training run, from one line in ``Trainer(callbacks=[...])``."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from mir_lightning.callbacks import reporting
from mir_lightning.callbacks.schedule import Schedule, tokens_of
from mir_lightning.callbacks.strategies import check_data_parallel, forward_through_strategy
from mir_lightning.functional.checks import check_choice
from mir_lightning.functional.mir import Variant
from mir_lightning.probing.batches import check_probe
from mir_lightning.probing.evaluate import MIRResult, UncheckedMaskWarning, evaluate_mir
from mir_lightning.probing.probe import Probe, ProbeLike
from mir_lightning.probing.run import HiddenStates
from mir_lightning.vlm import TextPositions, find_vlm

OnError = Literal["warn", "raise"]

_STATE_VERSION = 2


class MIRCallback(pl.Callback):
    """Evaluate the Modality Integration Rate of the model in training, on a fixed probe.

    Nothing is asked of the LightningModule but that it holds a Hugging Face vision-language model. The run
    is the same bit for bit with and without the callback. Logged to every logger of the Trainer, and set in
    ``trainer.callback_metrics`` (so that ``ModelCheckpoint(monitor="mir")`` works): ``mir``,
    ``mir_layers/layer_01`` and on, ``mir_rank/vision`` and ``mir_rank/text`` (mean effective rank; a low MIR
    with a low vision rank is collapse, not alignment), ``mir_outliers/vision`` and ``mir_outliers/text`` (share
    of the tokens), ``mir_probe/seconds``, ``mir_probe/overhead`` (share of the training time so far), and with
    labels in the probe ``mir_probe/loss`` and ``mir_probe/perplexity``; pictures ``mir_media/layers``,
    ``mir_media/heatmap`` and ``mir_media/tokens``.

    Distributed, each rank runs its share of the probe's batches, and all log and see the number of the whole
    probe. Give every rank the same probe.

    Args:
        probe: a :class:`~mir_lightning.Probe`, a ``DataLoader``, a list of batches, or a zero-argument
            callable that makes one when the fit starts.
        every_n_steps: optimizer steps between evaluations; ``None`` for none. The schedules below add to it.
        at_start: evaluate before the first step.
        at_end: evaluate after the last step, if that step was not evaluated yet.
        variant: ``"paper"``, ``"official"`` or ``"official-fast"``.
        text: which positions count as text: ``"after_vision"`` or ``"all"``.
        model: dotted path of the Hugging Face model inside the LightningModule; found by itself when None.
        name: prefix of everything logged; choose another for a second probe.
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
        hidden_states: for models that are not Hugging Face's, see :func:`~mir_lightning.evaluate_mir`; called
            with the LightningModule (or what is at ``model``) and a batch.
        picture_layer: decoder layer, counted from 1, whose tokens are drawn; the middle one when None.
        layers: dotted path of the decoder layers inside the Hugging Face model; found by a rule when None.
        image_token_id: placeholder of vision tokens in ``input_ids``; that of the model's config when None.
        check: see that the vision mask is right, at the first evaluation in which pixels reach the decoder; see
            :func:`~mir_lightning.evaluate_mir`.

    Raises:
        ValueError: for an unknown option or an interval below 1; when the fit starts, for a probe or a module
            that does not fit, ranks with different probes, or tensor parallelism.
    """

    def __init__(
        self,
        probe: ProbeLike,
        every_n_steps: int | None = 500,
        at_start: bool = True,
        at_end: bool = True,
        variant: Variant = "paper",
        text: TextPositions = "after_vision",
        model: str | None = None,
        name: str = "mir",
        on_error: OnError = "warn",
        at_steps: Sequence[int] = (),
        growth: float | None = None,
        every_n_epochs: int | None = None,
        every_n_tokens: int | None = None,
        max_overhead: float | None = None,
        strict_probe: bool = False,
        hidden_states: HiddenStates | None = None,
        picture_layer: int | None = None,
        layers: str | None = None,
        image_token_id: int | None = None,
        check: bool = True,
    ) -> None:
        check_choice("variant", variant, Variant)
        check_choice("text", text, TextPositions)
        check_choice("on_error", on_error, OnError)
        if max_overhead is not None and not 0 < max_overhead <= 1:
            raise ValueError(f"max_overhead must lie above 0 and up to 1, got {max_overhead}.")
        self.schedule = Schedule(every_n_steps, tuple(at_steps), growth, every_n_epochs, every_n_tokens)
        self.probe = probe
        self.at_start = at_start
        self.at_end = at_end
        self.variant = variant
        self.text = text
        self.model = model
        self.name = name
        self.on_error = on_error
        self.max_overhead = max_overhead
        self.strict_probe = strict_probe
        self.hidden_states = hidden_states
        self.picture_layer = picture_layer
        self.layers = layers
        self.image_token_id = image_token_id
        self.check = check
        self.history: list[dict[str, Any]] = []
        self._last_step: int | None = None
        self._stepped = 0
        self._tokens = 0
        self._tokens_of_step = 0
        self._train_seconds = 0.0
        self._probe_seconds = 0.0
        self._clock = 0.0
        self._restored_fingerprint: str | None = None
        self._network: nn.Module | None = None
        self._checked = False
        self._warned: set[str] = set()

    @property
    def state_key(self) -> str:
        """Two callbacks of different names keep their own state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the model and check the probe, so that mistakes show before the first step."""
        check_data_parallel(trainer)
        if self.hidden_states is None:
            vlm: PreTrainedModel | None = find_vlm(pl_module, self.model)
            self._network = vlm
        else:
            vlm, self._network = None, pl_module.get_submodule(self.model or "")
        self.probe = Probe.of(self.probe)
        if trainer.strategy.root_device.type == "cuda":
            self.probe.pin_memory()
        check_probe(vlm, self.probe, self.text, self.layers, self.image_token_id)
        self._check_fingerprint(trainer, self.probe.fingerprint)
        reporting.describe_run(trainer, self.name, self._settings(self.probe))

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

    def _settings(self, probe: Probe) -> dict[str, Any]:
        return {
            "variant": self.variant,
            "text": self.text,
            "probe_fingerprint": probe.fingerprint,
            "probe_batches": len(probe),
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Step 0; on resume, a point that the interrupted run was due but did not reach."""
        self._clock = time.monotonic()
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
        if self.check and self.hidden_states is None and self.history and not self._checked:
            rank_zero_warn(
                f"{self.name}: no evaluation could check the vision mask: pixels never reached the decoder."
            )

    def _seconds_of_training(self) -> float:
        return self._train_seconds + time.monotonic() - self._clock

    def _affordable(self, trainer: pl.Trainer) -> bool:
        """Whether one more evaluation like the last keeps within ``max_overhead``; rank 0 decides for all."""
        if self.max_overhead is None or not self.history:
            return True
        last = self.history[-1]["seconds"]
        share = (self._probe_seconds + last) / (self._seconds_of_training() + last)
        affordable = bool(trainer.strategy.broadcast(share <= self.max_overhead))
        if not affordable:
            rank_zero_info(
                f"{self.name}: evaluation at step {trainer.global_step} left out: with it, evaluations would have "
                f"taken {share:.1%} of the training time, above max_overhead={self.max_overhead:.1%}."
            )
        return affordable

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        start = time.monotonic()
        try:
            self._report(trainer, self._measure(trainer, pl_module))
        except Exception as error:
            if self.on_error == "raise":
                raise
            self._warn_once(f"MIR evaluation at step {step} failed, training goes on: {error}", str(error))
        finally:
            self._probe_seconds += time.monotonic() - start

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> MIRResult:
        """Run the probe, with the self-check until it has found the mask right."""
        network, probe = self._network, self.probe
        assert network is not None
        assert isinstance(probe, Probe)
        with trainer.precision_plugin.forward_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UncheckedMaskWarning)  # a silent projector may speak later
            result = evaluate_mir(
                network,
                probe,
                self.variant,
                self.text,
                forward=forward_through_strategy(trainer, pl_module, network),
                hidden_states=self.hidden_states,
                sample_layer=self.picture_layer,
                distributed=trainer.world_size > 1,
                layers=self.layers,
                image_token_id=self.image_token_id,
                check=self.check and self.hidden_states is None and not self._checked,
            )
        self._checked |= result.checked
        return result

    def _report(self, trainer: pl.Trainer, result: MIRResult) -> None:
        step = trainer.global_step
        trainer.callback_metrics[self.name] = torch.tensor(result.mir, device=trainer.strategy.root_device)
        self.history.append(reporting.point(result, step))
        values = reporting.scalars(result, self.name)
        spent = self._probe_seconds + result.seconds
        values[f"{self.name}_probe/overhead"] = min(1.0, spent / max(self._seconds_of_training(), spent))
        reports: list[Callable[[], None]] = [
            lambda: reporting.log_scalars(trainer, values),
            lambda: reporting.log_pictures(trainer, self.name, result, self.history),
        ]
        for report in reports:
            try:
                report()
            except Exception as error:
                if self.on_error == "raise":
                    raise
                self._warn_once(f"MIR of step {step} could not be logged everywhere: {error}", str(error))
        if message := reporting.collapse_warning(self.history):
            self._warn_once(f"{self.name}: {message}", "collapse")

    def _warn_once(self, message: str, cause: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            rank_zero_warn(message)

    def state_dict(self) -> dict[str, Any]:
        """The curve so far; plain numbers, loadable with ``weights_only``."""
        return {
            "version": _STATE_VERSION,
            "fingerprint": self.probe.fingerprint if isinstance(self.probe, Probe) else None,
            "last_step": self._last_step,
            "history": self.history,
            "tokens": self._tokens,
            "train_seconds": self._seconds_of_training() if self._clock else self._train_seconds,
            "probe_seconds": self._probe_seconds,
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
        self._tokens = state_dict["tokens"]
        self._train_seconds = state_dict["train_seconds"]
        self._probe_seconds = state_dict["probe_seconds"]
        self._restored_fingerprint = state_dict["fingerprint"]
