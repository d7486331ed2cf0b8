"""Negative controls: what spoils a run on purpose, to see which readings are fooled.

In a run of the recipe: ``--trainer.callbacks+=recipes.controls.Planted --trainer.callbacks.fault=shuffled``.
"""

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor

from mir_lightning.functional import modality_integration_rate
from mir_lightning.functional.checks import check_choice
from mir_lightning.llava.model.connector import output_layer
from mir_lightning.llava.model.module import model_inputs
from mir_lightning.vlm import parameters_of, token_masks

Fault = Literal["shuffled", "constant", "zeroed", "unshifted", "frozen"]


class Planted(pl.Callback):
    """Spoils training, and leaves the probes as they are.

    Args:
        fault: ``"shuffled"``: captions are beside other pictures of their batch; ``"constant"``: every text has
            the run's first picture; ``"zeroed"``: pixels do not arrive; ``"unshifted"``: the labels ask for the
            word that is given; ``"frozen"``: the projector never learns.
    """

    def __init__(self, fault: Fault) -> None:
        check_choice("fault", fault, Fault)
        self.fault = fault
        self._first: Tensor | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Change the batch in place."""
        pixels = batch["pixel_values"]
        if self.fault == "shuffled":
            batch["pixel_values"] = pixels.roll(1 + trainer.global_step % 3, 0)
        elif self.fault == "constant":
            self._first = pixels[:1] if self._first is None else self._first
            batch["pixel_values"] = self._first.expand_as(pixels)
        elif self.fault == "zeroed":
            batch["pixel_values"] = pixels * 0
        elif self.fault == "unshifted":
            labels, given = batch["labels"], batch["input_ids"].roll(1, 1)
            batch["labels"] = labels.where(labels == -100, given)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Take the projector's gradients away."""
        if self.fault == "frozen":
            for parameter in parameters_of(pl_module.vlm, "projector").values():
                parameter.grad = None


class Scaled(pl.Callback):
    """What the projector gives is multiplied once training is over, before the last evaluations.

    Args:
        factor: of its last layer's weights and bias.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """After the last step."""
        if trainer.global_step == trainer.estimated_stepping_batches:
            for parameter in output_layer(pl_module.vlm).parameters():
                parameter.data *= self.factor


class MIRLoss(pl.Callback):
    """Trains on MIR of the batch, instead of the texts."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the training step's place."""

        def step(batch: Mapping[str, Any], batch_idx: int) -> Tensor:
            inputs = {**model_inputs(batch, False), "logits_to_keep": 1}
            inputs.pop("labels")
            states = pl_module.vlm(**inputs, use_cache=False, output_hidden_states=True).hidden_states[1:]
            masks = token_masks(pl_module.vlm.config, batch, "after_vision")
            vision, text = ([state[mask] for state in states] for mask in (masks.vision, masks.text))
            loss: Any = modality_integration_rate(vision, text, differentiable=True)
            pl_module.log("train/loss", loss)
            return loss

        pl_module.training_step = step
