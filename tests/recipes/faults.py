"""Faults planted in a run of the recipe, to see which readings tell of them.

    python recipes/llava_pretrain.py fit --config recipes/configs/demo.yaml \
        --trainer.callbacks+=tests.recipes.faults.Planted --trainer.callbacks.fault=shuffled
"""

from typing import Any, Literal

import lightning.pytorch as pl


class Planted(pl.Callback):
    """Spoils training, and leaves the probes as they are.

    Args:
        fault: ``"shuffled"``: captions are beside other pictures of their batch; ``"zeroed"``: pixels do not
            arrive; ``"unshifted"``: the labels ask for the word that is given; ``"frozen"``: the projector never
            learns.
    """

    def __init__(self, fault: Literal["shuffled", "zeroed", "unshifted", "frozen"]) -> None:
        self.fault = fault

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.fault == "shuffled":
            batch["pixel_values"] = batch["pixel_values"].roll(1 + trainer.global_step % 3, 0)
        elif self.fault == "zeroed":
            batch["pixel_values"] = batch["pixel_values"] * 0
        elif self.fault == "unshifted":
            labels, given = batch["labels"], batch["input_ids"].roll(1, 1)
            batch["labels"] = labels.where(labels == -100, given)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.fault == "frozen":
            for parameter in pl_module.vlm.model.multi_modal_projector.parameters():
                parameter.grad = None
