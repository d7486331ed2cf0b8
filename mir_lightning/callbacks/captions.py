"""``CaptionCallback``: what the model writes about a few fixed pictures, at points of a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mir_lightning.callbacks import figures
from mir_lightning.callbacks.few_shot import FewShotCallback
from mir_lightning.callbacks.loops import Drawing
from mir_lightning.probing.choices.few_shot import FewShotProbe, FewShotResult
from mir_lightning.probing.choices.items import open_image


class CaptionCallback(FewShotCallback):
    """Write captions of fixed pictures with the model in training.

    One picture with all captions goes to W&B and TensorBoard and as ``captions.png`` beside the CSV log; W&B also
    gets a table of all captions so far (``captions_media/table``).

    Args:
        items: a :class:`~mir_lightning.probing.FewShotProbe` without examples, ``shots=(0,)``, of one picture an
            item, or a zero-argument callable that makes one when the fit starts.
        max_new_tokens: length of a caption.
        name: prefix of everything logged.
        options: of :class:`~mir_lightning.callbacks.FewShotCallback`.

    Raises:
        ValueError: when the fit starts, for items that show examples or no picture.
    """

    label = "Caption"

    def __init__(
        self,
        items: FewShotProbe | Callable[[], FewShotProbe],
        max_new_tokens: int = 32,
        name: str = "captions",
        **options: Any,
    ) -> None:
        super().__init__(items, max_new_tokens=max_new_tokens, name=name, **options)

    def make_probe(self, source: FewShotProbe | Callable[[], FewShotProbe]) -> FewShotProbe:
        """The pictures."""
        probe = super().make_probe(source)
        if list(probe.probes) != [0] or any(len(item.images) != 1 for item in probe.probes[0].items):
            raise ValueError(f"items of {self.name} must show one picture each and no examples: shots=(0,).")
        return probe

    def values(self, result: FewShotResult) -> dict[str, float]:
        """A few captions make no score."""
        return {}

    def remembered(self, result: FewShotResult) -> dict[str, Any]:
        """The captions."""
        return {"captions": result.answers[0]}

    def draw(self, result: FewShotResult, step: int) -> Drawing:
        """The pictures with their captions, and all captions so far."""
        items = self.probe.probes[0].items
        figure = figures.caption_figure(
            [open_image(item.images[0]) for item in items],
            result.answers[0],
            [item.answer for item in items],
            step,
        )
        rows = [
            [point["step"], item.id, caption, item.answer]
            for point in self.history  # those of a Hugging Face Trainer's log have no captions
            for item, caption in zip(items, point.get("captions", ()), strict=False)
        ]
        return {"captions": figure}, (["step", "picture", "caption", "reference"], rows)
