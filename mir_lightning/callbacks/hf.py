"""``MIRTrainerCallback``: MIR curves from the Hugging Face Trainer, and trainers built on it (TRL's)."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mir_lightning.callbacks import reporting
from mir_lightning.callbacks.budget import Budget
from mir_lightning.callbacks.probing import OnError
from mir_lightning.callbacks.schedule import Schedule
from mir_lightning.functional.checks import check_choice
from mir_lightning.functional.mir import Variant
from mir_lightning.probing.batches import check_probe
from mir_lightning.probing.evaluate import MIRResult, evaluate_mir
from mir_lightning.probing.probe import Probe, ProbeLike
from mir_lightning.vlm import TextPositions, find_vlm

logger = logging.getLogger(__name__)


class MIRTrainerCallback(TrainerCallback):
    """Evaluate the Modality Integration Rate of the model that a Hugging Face ``Trainer`` trains.

    The same numbers under the same names as :class:`~mir_lightning.MIRCallback`, through ``trainer.log``: they
    reach every integration in ``report_to`` (W&B shows them as ``train/mir`` and so on) and
    ``state.log_history``, which is also where a resumed run finds its curve. Pictures lie in
    ``<output_dir>/<name>_media/``, and go to W&B where a run is open. The training run is the same with and
    without the callback.

    Args:
        trainer: the trainer, which the callback is then added to: ``trainer.add_callback(callback)``.
        probe: as for :class:`~mir_lightning.MIRCallback`, and so are all options below.
        every_n_steps: optimizer steps between evaluations; ``None`` for none.
        at_start: evaluate before the first step.
        at_end: evaluate after the last step.
        variant: of ``mir``: ``"paper"``, ``"robust"``, ``"official"`` or ``"official-fast"``.
        text: which positions count as text: ``"after_vision"`` or ``"all"``.
        model: dotted path of the Hugging Face model inside the trainer's; found by itself when None.
        name: prefix of everything logged.
        on_error: ``"warn"`` reports a failed evaluation and training goes on; ``"raise"`` stops.
        at_steps: also evaluate after these optimizer steps.
        growth: also evaluate after geometrically spaced steps.
        every_n_epochs: also evaluate at the end of every so many epochs.
        every_n_tokens: also evaluate whenever so many more tokens have been trained on; needs
            ``include_num_input_tokens_seen`` in the training arguments.
        max_overhead: largest share of the training time that evaluations may take.
        strict_probe: raise, instead of warning, when a run resumes with a probe of other contents.
        picture_layer: decoder layer, counted from 1, whose tokens are drawn; the middle one when None.
        layers: dotted path of the decoder layers inside the model; found by a rule when None.
        image_token_id: placeholder of vision tokens; that of the model's config when None.
        check: see that the vision mask is right, at the first evaluation in which pixels reach the decoder.

    Raises:
        ValueError: for an unknown option or an interval below 1; when training starts, for a probe or a model
            that does not fit, or tokens that are not counted.
    """

    def __init__(
        self,
        trainer: Trainer,
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
        picture_layer: int | None = None,
        layers: str | None = None,
        image_token_id: int | None = None,
        check: bool = True,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}.")
        check_choice("variant", variant, Variant)
        check_choice("text", text, TextPositions)
        check_choice("on_error", on_error, OnError)
        self.schedule = Schedule(every_n_steps, tuple(at_steps), growth, every_n_epochs, every_n_tokens)
        self.budget = Budget(max_overhead)
        self.trainer = trainer
        self.probe = probe
        self.at_start = at_start
        self.at_end = at_end
        self.variant = variant
        self.text = text
        self.model = model
        self.name = name
        self.on_error = on_error
        self.strict_probe = strict_probe
        self.picture_layer = picture_layer
        self.layers = layers
        self.image_token_id = image_token_id
        self.check = check
        self._vlm: PreTrainedModel | None = None
        self._last_step: int | None = None
        self._tokens = 0

    @property
    def _output_dir(self) -> Path:
        return Path(self.trainer.args.output_dir or ".")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the model and check the probe; step 0, or a point that an interrupted run did not reach."""
        if self.schedule.every_n_tokens is not None and args.include_num_input_tokens_seen in (False, "no"):
            raise ValueError("every_n_tokens needs include_num_input_tokens_seen=True in the TrainingArguments.")
        assert self.trainer.model is not None
        self._vlm = find_vlm(self.trainer.model, self.model)
        self.probe = Probe.of(self.probe)
        check_probe(self._vlm, self.probe, self.text, self.layers, self.image_token_id)
        self._check_fingerprint(self._output_dir, state)
        self._tokens = int(state.num_input_tokens_seen)
        self._last_step = max((point["step"] for point in self._history(state)), default=None)
        self.budget.start()
        step = state.global_step
        if (self.at_start and step == 0) or (step and self.schedule.due_at_step(step)):
            self._evaluate(state)

    def _check_fingerprint(self, folder: Path, state: TrainerState) -> None:
        """The probe's fingerprint lies in the output folder, for a resumed run to compare."""
        assert isinstance(self.probe, Probe)
        file = folder / f"{self.name}_probe.txt"
        before = file.read_text().strip() if state.global_step and file.is_file() else None
        if before is not None and before != self.probe.fingerprint:
            message = (
                f"probe: its fingerprint {self.probe.fingerprint[:12]} is not that of the interrupted run, "
                f"{before[:12]}: the points of the {self.name} curve before and after are not comparable."
            )
            if self.strict_probe:
                raise ValueError(message)
            logger.warning(message)
        if self.trainer.is_world_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(self.probe.fingerprint + "\n")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate after an optimizer step that is due, or the last."""
        before, self._tokens = self._tokens, int(state.num_input_tokens_seen)
        due = self.schedule.due_at_step(state.global_step) or self.schedule.due_at_tokens(before, self._tokens)
        last = self.at_end and state.global_step >= state.max_steps
        if last or (due and self._affordable(state)):
            self._evaluate(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate at the end of an epoch that is due."""
        if self.schedule.due_at_epoch(round(state.epoch or 0)) and self._affordable(state):
            self._evaluate(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate the last step of a run that stopped early."""
        if self.at_end:
            self._evaluate(state)

    def _affordable(self, state: TrainerState) -> bool:
        """Whether one more evaluation keeps within ``max_overhead``; the first rank decides for all."""
        history = self._history(state)
        coming = history[-1]["seconds"] if history else 0.0
        affordable = [self.budget.allows(coming)]
        if _distributed():
            dist.broadcast_object_list(affordable, src=0)
        if not affordable[0]:
            logger.info(self.budget.refusal(self.name, state.global_step, coming))
        return affordable[0]

    def _evaluate(self, state: TrainerState) -> None:
        if state.global_step == self._last_step:
            return
        self._last_step = state.global_step
        start = time.perf_counter()
        try:
            self._report(self._measure(), state)
        except Exception as error:
            if self.on_error == "raise":
                raise
            logger.warning(f"MIR evaluation at step {state.global_step} failed, training goes on: {error}")
        finally:
            self.budget.evaluating += time.perf_counter() - start

    def _measure(self) -> MIRResult:
        trainer, probe = self.trainer, self.probe
        assert self._vlm is not None
        assert isinstance(probe, Probe)
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        result = evaluate_mir(
            self._vlm,
            probe,
            self.variant,
            self.text,
            forward=trainer.model_wrapped if sharded else None,
            sample_layer=self.picture_layer,
            distributed=_distributed(),
            layers=self.layers,
            image_token_id=self.image_token_id,
            check=self.check,
        )
        self.check &= not result.checked
        return result

    def _report(self, result: MIRResult, state: TrainerState) -> None:
        values = reporting.scalars(result, self.name)
        values[f"{self.name}_probe/seconds"] = result.seconds
        values[f"{self.name}_probe/overhead"] = self.budget.share(result.seconds)
        row_is_due = self.trainer.control.should_log
        self.trainer.log(values)
        self.trainer.control.should_log = row_is_due  # logging took it for the trainer's own row
        history = self._history(state)
        if message := reporting.collapse_warning(history):
            logger.warning(f"{self.name}: {message}")
        if self.trainer.is_world_process_zero():
            figures = reporting.pictures(result, state.global_step, history)
            reporting.save_pictures(self._output_dir / f"{self.name}_media", figures)
            self._pictures_to_wandb(figures, state.global_step)

    def _pictures_to_wandb(self, figures: dict[str, Any], step: int) -> None:
        if "wandb" not in (self.trainer.args.report_to or ()):
            return
        import wandb

        if wandb.run is not None:
            images = {f"{self.name}_media/{key}": wandb.Image(figure) for key, figure in figures.items()}
            wandb.log({**images, "train/global_step": step})

    def _history(self, state: TrainerState) -> list[dict[str, Any]]:
        """The curve so far, from what was logged; in a checkpoint with the trainer's state."""
        return [reporting.logged_point(row, self.name) for row in state.log_history if self.name in row]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
