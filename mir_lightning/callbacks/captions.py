"""``CaptionCallback``: what the model writes about a few fixed pictures, at points of a training run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from mir_lightning.callbacks import reporting
from mir_lightning.callbacks.few_shot import FewShotCallback
from mir_lightning.probing.choice_items import open_image
from mir_lightning.probing.few_shot import FewShotLike, FewShotProbe, FewShotResult


class CaptionCallback(FewShotCallback):
    """Write captions of fixed pictures with the model in training.

    One picture with all captions goes to W&B and TensorBoard and as ``captions.png`` beside the CSV log; W&B also
    gets a table of all captions so far (``captions_media/table``). Logged as numbers: ``captions_probe/seconds``
    and ``captions_probe/overhead``.

    Args:
        items: a :class:`~mir_lightning.probing.few_shot.FewShotProbe` without examples, ``shots=(0,)``, of one
            picture an item, or a zero-argument callable that makes one when the fit starts.
        max_new_tokens: length of a caption.
        name: prefix of everything logged.
        options: of :class:`~mir_lightning.callbacks.FewShotCallback`.

    Raises:
        ValueError: for an unknown option or a number below 1; when the fit starts, for items that show examples or
            no picture, a module that does not fit, ranks with different items, or tensor parallelism.
        TypeError: when the fit starts, for items of another kind.
    """

    label = "Caption"

    def __init__(
        self, items: FewShotLike, max_new_tokens: int = 32, name: str = "captions", **options: Any
    ) -> None:
        super().__init__(items, max_new_tokens=max_new_tokens, name=name, **options)

    def _prepare(self, pl_module: pl.LightningModule) -> tuple[str, dict[str, Any]]:
        prepared = super()._prepare(pl_module)
        assert isinstance(self.items, FewShotProbe)
        if list(self.items.probes) != [0] or any(len(item.images) != 1 for item in self.items.probes[0].items):
            raise ValueError(f"items of {self.name} must show one picture each and no examples: shots=(0,).")
        return prepared

    def _values(self, result: FewShotResult) -> dict[str, float]:
        """A few captions make no score."""
        return {}

    def _point(self, result: FewShotResult, step: int) -> dict[str, Any]:
        return {"step": step, "seconds": result.seconds, "captions": result.answers[0]}

    def _draw(self, trainer: pl.Trainer, result: FewShotResult) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(self.items, FewShotProbe)
        items = self.items.probes[0].items
        figure = reporting.caption_figure(
            [open_image(item.images[0]) for item in items],
            result.answers[0],
            [item.answer for item in items],
            trainer.global_step,
        )
        rows = [
            [point["step"], item.id, caption, item.answer]
            for point in self.history
            for item, caption in zip(items, point["captions"], strict=True)
        ]
        table = (["step", "picture", "caption", "reference"], rows)
        reporting.log_figures(trainer, self.name, {"captions": figure}, table)
