"""``MIRCallback``: MIR curves of a training run, from one line in ``Trainer(callbacks=[...])``."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

from mir_lightning.callbacks.reporting import (
    define_wandb_metric,
    heatmap_figure,
    layer_figure,
    log_pictures,
    log_scalars,
    scalars,
)
from mir_lightning.functional.checks import check_at_least_one, check_choice
from mir_lightning.functional.mir import Variant
from mir_lightning.probing.evaluate import MIRResult, check_probe, evaluate_mir
from mir_lightning.probing.probe import Probe, ProbeLike
from mir_lightning.vlm import TextPositions, find_decoder, find_vlm

OnError = Literal["warn", "raise"]


class MIRCallback(pl.Callback):
    """Evaluate the Modality Integration Rate of the model in training, on a fixed probe.

    Nothing is asked of the LightningModule but that it holds a Hugging Face vision-language model. The run
    is the same bit for bit with and without the callback. Logged to every logger of the Trainer, and set in
    ``trainer.callback_metrics`` (so that ``ModelCheckpoint(monitor="mir")`` works): ``mir``,
    ``mir_layers/layer_01`` and on, ``mir_rank/vision`` and ``mir_rank/text`` (mean effective rank; a low MIR
    with a low vision rank is collapse, not alignment), ``mir_probe/seconds``, and with labels in the probe
    ``mir_probe/loss`` and ``mir_probe/perplexity``; pictures ``mir_media/layers`` and ``mir_media/heatmap``.

    Args:
        probe: a :class:`~mir_lightning.Probe`, a ``DataLoader``, a list of batches, or a zero-argument
            callable that makes one when the fit starts.
        every_n_steps: optimizer steps between evaluations.
        at_start: evaluate before the first step.
        at_end: evaluate after the last step, if that step was not evaluated yet.
        variant: ``"paper"``, ``"official"`` or ``"official-fast"``.
        text: which positions count as text: ``"after_vision"`` or ``"all"``.
        model: dotted path of the Hugging Face model inside the LightningModule; found by itself when None.
        name: prefix of everything logged; choose another for a second probe.
        on_error: what a failed evaluation does once training runs: ``"warn"`` reports it with the step and
            training goes on; ``"raise"`` stops. What can be checked at the start always raises.

    Raises:
        ValueError: for ``every_n_steps`` below 1 or an unknown option; when the fit starts, for a probe or a
            module that does not fit.
    """

    def __init__(
        self,
        probe: ProbeLike,
        every_n_steps: int = 500,
        at_start: bool = True,
        at_end: bool = True,
        variant: Variant = "paper",
        text: TextPositions = "after_vision",
        model: str | None = None,
        name: str = "mir",
        on_error: OnError = "warn",
    ) -> None:
        check_at_least_one(every_n_steps=every_n_steps)
        check_choice("variant", variant, Variant)
        check_choice("text", text, TextPositions)
        check_choice("on_error", on_error, OnError)
        self.probe = probe
        self.every_n_steps = every_n_steps
        self.at_start = at_start
        self.at_end = at_end
        self.variant = variant
        self.text = text
        self.model = model
        self.name = name
        self.on_error = on_error
        self.history: list[dict[str, Any]] = []
        self._last_step: int | None = None
        self._vlm: PreTrainedModel | None = None
        self._warned: set[str] = set()

    @property
    def state_key(self) -> str:
        """Two callbacks of different names keep their own state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the model and check the probe, so that mistakes show before the first step."""
        self._vlm = find_vlm(pl_module, self.model)
        find_decoder(self._vlm)
        self.probe = Probe.of(self.probe)
        check_probe(self._vlm, self.probe, self.text)
        define_wandb_metric(trainer, self.name)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Step 0."""
        if self.at_start and trainer.global_step == 0:
            self._evaluate(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Every N optimizer steps, once each (micro-batches of an accumulation share a step)."""
        if trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._evaluate(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Last step."""
        if self.at_end:
            self._evaluate(trainer)

    def _evaluate(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        assert self._vlm is not None
        assert isinstance(self.probe, Probe)
        try:
            with trainer.precision_plugin.forward_context():
                result = evaluate_mir(self._vlm, self.probe, self.variant, self.text)
            self._report(trainer, result)
        except Exception as error:
            if self.on_error == "raise":
                raise
            self._warn_once(f"MIR evaluation at step {step} failed, training goes on: {error}", str(error))

    def _report(self, trainer: pl.Trainer, result: MIRResult) -> None:
        step = trainer.global_step
        trainer.callback_metrics[self.name] = torch.tensor(result.mir, device=trainer.strategy.root_device)
        self.history.append(
            {
                "step": step,
                "mir": result.mir,
                "loss": result.loss,
                "perplexity": result.perplexity,
                "seconds": result.seconds,
                "vision_rank": result.effective_rank[:, 0].mean().item(),
                "text_rank": result.effective_rank[:, 1].mean().item(),
                "layers": result.layers.tolist(),
            }
        )
        log_scalars(trainer, scalars(result, self.name))
        if trainer.is_global_zero:
            try:
                heatmap = heatmap_figure(
                    [point["step"] for point in self.history], [point["layers"] for point in self.history]
                )
                log_pictures(trainer, self.name, {"layers": layer_figure(result, step), "heatmap": heatmap})
            except (ImportError, OSError) as error:
                self._warn_once(f"MIR pictures of step {step} could not be drawn: {error}", str(error))

    def _warn_once(self, message: str, cause: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            rank_zero_warn(message)

    def state_dict(self) -> dict[str, Any]:
        """The curve so far; plain numbers, loadable with ``weights_only``."""
        return {"last_step": self._last_step, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the curve of a checkpoint."""
        self._last_step = state_dict["last_step"]
        self.history = list(state_dict["history"])
