"""``MIRTrainerCallback``: MIR curves from the Hugging Face Trainer, and trainers built on it (TRL's)."""

# ruff: noqa: D102  (what a loop does is said once, in its base; hooks are transformers')

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState

from mir_lightning.callbacks import loggers
from mir_lightning.callbacks.base import ProbingCallback
from mir_lightning.callbacks.loops import Loop, Table
from mir_lightning.callbacks.mir import MIRCallback
from mir_lightning.files import read_json
from mir_lightning.probing.network import Forward
from mir_lightning.probing.probe import ProbeLike

T = TypeVar("T")


class TrainerLoop(Loop):
    """A Hugging Face Trainer's."""

    def __init__(self, trainer: Trainer) -> None:
        assert trainer.model is not None
        self.trainer = trainer
        self.module = trainer.model
        self.step = trainer.state.global_step
        self.ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.first = trainer.is_world_process_zero()
        self.callbacks = [getattr(other, "probing", other) for other in trainer.callback_handler.callbacks]
        self.shows_bars = self.first and not trainer.args.disable_tqdm
        self.shows_pictures = self._wandb_run is not None

    def from_first(self, value: T) -> T:
        shared = [value]
        if self.ranks > 1:
            dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def all_agree(self, agrees: bool) -> bool:
        votes = [agrees]
        if self.ranks > 1:
            votes = [agrees] * self.ranks
            dist.all_gather_object(votes, agrees)
        return all(votes)

    def precision(self) -> AbstractContextManager[Any]:
        return self.trainer.accelerator.autocast()

    def forward_of(self, vlm: nn.Module) -> Forward | None:
        sharded = self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled
        return self.trainer.model_wrapped if sharded else None

    def monitor(self, values: Mapping[str, float]) -> None:
        """Seen in :meth:`ProbingTrainerCallback.on_evaluate`, which is where the trainer looks for the best."""

    def describe(self, name: str, settings: dict[str, Any], best: str) -> None:
        """Integrations keep the TrainingArguments, and no more."""

    def log(self, values: dict[str, float]) -> None:
        row_is_due = self.trainer.control.should_log
        # Not the trainer's own ``log``: TRL's merges its running figures into any row, and clears them.
        Trainer.log(self.trainer, dict(values))
        self.trainer.control.should_log = row_is_due  # logging took it for the trainer's own row

    @property
    def _wandb_run(self) -> Any:
        """The run in which the Trainer logs, where it logs to W&B."""
        if "wandb" not in (self.trainer.args.report_to or ()):
            return None
        import wandb

        return wandb.run

    def alert(self, title: str, message: str) -> None:
        if self.first and (run := self._wandb_run) is not None:
            run.alert(title, message, level="WARN")

    def log_media(self, name: str, figures: loggers.Figures, table: Table) -> None:
        folder = Path(self.trainer.args.output_dir or ".") / f"{name}_media"
        pictures = loggers.save_figures(folder, figures)
        if (run := self._wandb_run) is not None:
            import wandb

            media = {f"{name}_media/{key}": wandb.Image(str(file)) for key, file in pictures.items()}
            run.log({**media, "train/global_step": self.step})


class ProbingTrainerCallback(TrainerCallback):
    """Any probing callback in a Hugging Face ``Trainer``.

    The same numbers under the same names as in Lightning, through ``Trainer.log``: they reach every integration in
    ``report_to`` (W&B shows them as ``train/mir`` and so on) and ``state.log_history``, which is also where a
    resumed run finds its curve. Pictures lie in ``<output_dir>/<name>_media/``, and go to W&B where a run is open.
    The training run is the same with and without the callback.

    ``metric_for_best_model="mir"`` with ``greater_is_better=False`` keeps the best model by what is monitored; a
    point is then taken at each of the trainer's own evaluations. With ``load_best_model_at_end`` the last point is
    of the last step's weights. Where an epoch's evaluation stops the run early, that point cannot be taken any
    more.

    Args:
        probing: what to evaluate and when; see there.
        trainer: the trainer that the callback is added to; found by itself when training starts.

    Raises:
        ValueError: when training starts, as ``probing`` says, for tokens that are not counted, or for
            ``greater_is_better`` the wrong way round.
    """

    def __init__(self, probing: ProbingCallback, trainer: Trainer | None = None) -> None:
        if trainer is not None and not isinstance(trainer, Trainer):
            raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}.")
        self.probing = probing
        self.trainer = trainer
        self._epochs = 0
        self._training = False
        self._selects: str | None = None

    def _loop(self, state: TrainerState) -> TrainerLoop:
        if self.trainer is None or self.trainer.state is not state:
            # transformers tells its callbacks everything but whose they are.
            trainers = (found for found in gc.get_objects() if issubclass(type(found), Trainer))
            self.trainer = next(trainer for trainer in trainers if vars(trainer).get("state") is state)
        return TrainerLoop(self.trainer)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        counts = self.probing.schedule.every_n_tokens is not None
        if counts and args.include_num_input_tokens_seen in (False, "no"):
            raise ValueError("every_n_tokens needs include_num_input_tokens_seen=True in the TrainingArguments.")
        loop, probing, name = self._loop(state), self.probing, self.probing.name
        wanted = (args.metric_for_best_model or "").removeprefix("eval_")
        self._selects = wanted if wanted == name or wanted.startswith(f"{name}_") else None
        if self._selects and args.greater_is_better != (probing.best == "max"):
            raise ValueError(
                f"metric_for_best_model={wanted!r} is best at its {probing.best}imum: give the TrainingArguments "
                f"greater_is_better={probing.best == 'max'}."
            )
        handler = loop.trainer.callback_handler  # to come before what looks for the monitored values
        others = [callback for callback in handler.callbacks if callback is not self]
        handler.callbacks = [self, *others]  # a new list: the handler is in the middle of this one
        self._training = True
        self._epochs = int((state.epoch or 0.0) + 1e-6) if state.global_step else 0
        history = [row for row in state.log_history if f"{name}_probe/seconds" in row]
        file = Path(args.output_dir or ".") / f"{name}_probe.json"
        resumed = bool(state.global_step) and file.is_file()
        probing.load_state_dict(
            {
                **probing.state_dict(),
                "history": history,
                "monitored": {},
                "last_step": history[-1]["step"] if history else None,
                "tokens": int(state.num_input_tokens_seen),
                "settings": read_json(file) if resumed else {},
            }
        )
        probing.begin(loop)
        if loop.first:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(probing.settings))
        probing.start(loop)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        loop = self._loop(state)
        counts = self.probing.schedule.every_n_tokens is not None
        self.probing.after_step(loop, int(state.num_input_tokens_seen) if counts else None)
        if state.global_step >= state.max_steps:
            self.probing.end(loop)

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._epochs += 1
        self.probing.after_epoch(self._loop(state), self._epochs)
        if control.should_training_stop:
            self.probing.end(self._loop(state))

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Put the monitored values among the trainer's own, where it looks for the best."""
        if not self._training:
            return  # the weights may be others by now
        if self._selects:
            self.probing.evaluate(self._loop(state))
        worst = {self._selects: math.inf if self.probing.best == "min" else -math.inf} if self._selects else {}
        values = {**worst, **self.probing.last_monitored}
        kwargs.get("metrics", {}).update({f"eval_{name}": value for name, value in values.items()})

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._training = False
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            return  # the weights are those of an earlier step by now
        self.probing.end(self._loop(state))


class MIRTrainerCallback(ProbingTrainerCallback):
    """Evaluate the Modality Integration Rate of the model that a Hugging Face ``Trainer`` trains.

    Args:
        trainer: the trainer that the callback is added to; may be left out, so that the callback can be made
            before the trainer: ``Trainer(..., callbacks=[MIRTrainerCallback(probe)])``.
        probe: and ``options``: as for :class:`~mir_lightning.MIRCallback`. ``every_n_tokens`` needs
            ``include_num_input_tokens_seen`` in the training arguments.
    """

    def __init__(
        self, trainer: Trainer | ProbeLike | None = None, probe: ProbeLike | None = None, **options: Any
    ) -> None:
        if probe is None:
            trainer, probe = None, trainer
        if probe is None or isinstance(probe, Trainer):
            raise TypeError("probe is missing: MIRTrainerCallback(probe) or MIRTrainerCallback(trainer, probe).")
        super().__init__(MIRCallback(probe, **options), trainer)  # type: ignore[arg-type]
