"""``MIRCallback``: MIR curves of a training run, from one line in ``Trainer(callbacks=[...])``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from mir_lightning.callbacks import reporting
from mir_lightning.callbacks.probing import OnError, ProbingCallback
from mir_lightning.callbacks.schedule import Schedule
from mir_lightning.callbacks.strategies import forward_through_strategy
from mir_lightning.functional.checks import check_choice
from mir_lightning.functional.mir import Variant
from mir_lightning.probing.batches import check_probe
from mir_lightning.probing.evaluate import MIRResult, UncheckedMaskWarning, evaluate_mir
from mir_lightning.probing.probe import Probe, ProbeLike
from mir_lightning.probing.run import HiddenStates
from mir_lightning.vlm import TextPositions, find_vlm


class MIRCallback(ProbingCallback):
    """Evaluate the Modality Integration Rate of the model in training, on a fixed probe.

    Nothing is asked of the LightningModule but that it holds a Hugging Face vision-language model. The run
    is the same bit for bit with and without the callback. Logged to every logger of the Trainer, and set in
    ``trainer.callback_metrics`` (so that ``ModelCheckpoint(monitor="mir")`` works): ``mir`` and ``mir_robust``
    (by an outlier rule that many massive tokens cannot mask). To the loggers only:
    ``mir_layers/layer_01`` and on, ``mir_rank/vision`` and ``mir_rank/text`` (mean effective rank; a low MIR
    with a low vision rank is collapse, not alignment), ``mir_outliers/vision`` and ``mir_outliers/text`` (share
    of the tokens), ``mir_massive/vision`` and ``mir_massive/text`` (share outside the robust rule),
    ``mir_probe/seconds``, ``mir_probe/overhead`` (share of the training time so far), and with
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
        variant: of ``mir``: ``"paper"``, ``"robust"``, ``"official"`` or ``"official-fast"``.
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

    label = "MIR"
    best = "min"

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
        schedule = Schedule(every_n_steps, tuple(at_steps), growth, every_n_epochs, every_n_tokens)
        super().__init__(schedule, at_start, at_end, name, on_error, max_overhead, strict_probe)
        self.probe = probe
        self.variant = variant
        self.text = text
        self.model = model
        self.hidden_states = hidden_states
        self.picture_layer = picture_layer
        self.layers = layers
        self.image_token_id = image_token_id
        self.check = check
        self._checked = False
        self._network: nn.Module | None = None

    def _prepare(self, pl_module: pl.LightningModule) -> tuple[str, dict[str, Any]]:
        if self.hidden_states is None:
            vlm: PreTrainedModel | None = find_vlm(pl_module, self.model)
            self._network = vlm
        else:
            vlm, self._network = None, pl_module.get_submodule(self.model or "")
        self.probe = probe = Probe.of(self.probe)
        if pl_module.device.type == "cuda":
            probe.pin_memory()
        check_probe(vlm, probe, self.text, self.layers, self.image_token_id)
        return probe.fingerprint, {
            "variant": self.variant,
            "text": self.text,
            "probe_fingerprint": probe.fingerprint,
            "probe_batches": len(probe),
        }

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Last step; and what the self-check could not tell."""
        super().on_train_end(trainer, pl_module)
        if self.check and self.hidden_states is None and self.history and not self._checked:
            rank_zero_warn(
                f"{self.name}: no evaluation could check the vision mask: pixels never reached the decoder."
            )

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
                progress=self._bar_title(trainer),
                layers=self.layers,
                image_token_id=self.image_token_id,
                check=self.check and self.hidden_states is None and not self._checked,
            )
        self._checked |= result.checked
        return result

    def _values(self, result: MIRResult) -> dict[str, float]:
        return reporting.scalars(result, self.name)

    def _monitored(self, result: MIRResult) -> dict[str, float]:
        return {self.name: result.mir, f"{self.name}_robust": result.mir_robust}

    def _point(self, result: MIRResult, step: int) -> dict[str, Any]:
        return reporting.point(result, step)

    def _draw(self, trainer: pl.Trainer, result: MIRResult) -> None:
        reporting.log_pictures(trainer, self.name, result, self.history)

    def _warning(self) -> str | None:
        return reporting.collapse_warning(self.history)
