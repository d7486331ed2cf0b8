"""``ImageGainCallback``: whether the model looks at the pictures, at points of a training run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from mir_lightning.callbacks import figures
from mir_lightning.callbacks.base import ProbingCallback
from mir_lightning.callbacks.loggers import check_source
from mir_lightning.callbacks.loops import Drawing, Loop
from mir_lightning.probing.exchange import Exchange
from mir_lightning.probing.image_gain import ImageGainResult, evaluate_image_gain
from mir_lightning.probing.network import Network, ProbeWarning
from mir_lightning.probing.probe import ProbeLike


class ImageGainCallback(ProbingCallback):
    """Evaluate the image gain of the model in training: what its own picture is worth to a text, in nats a token.

    Logged to every logger of the Trainer, and set in ``trainer.callback_metrics`` (so that
    ``ModelCheckpoint(monitor="image_gain", mode="max")`` works): ``image_gain`` (against another sample's
    picture; 0 means that the model does not look) and ``image_gain_blank`` (against a picture of one colour). To
    the loggers only: their standard errors ``image_gain_se`` and ``image_gain_blank_se``,
    ``image_gain_probe/loss`` (with the right pictures), and ``image_gain_sources/<source>`` where the probe's
    batches name sources; the picture ``image_gain_media/curve``.

    Args:
        probe: a :class:`~mir_lightning.Probe` of batches with labels, a ``DataLoader``, a list of batches, or a
            zero-argument callable that makes one when the fit starts.
        every_n_steps: optimizer steps between evaluations; ``None`` for none.
        image_token_id: placeholder of vision tokens in ``input_ids``; that of the model's config when None.
        seed: of who gets whose picture.
        name: prefix of everything logged; choose another for a second probe.
        options: when, and what if it fails: of :class:`~mir_lightning.callbacks.base.ProbingCallback`.

    Raises:
        ValueError: when the fit starts, for a probe that has nothing to exchange, see
            :func:`~mir_lightning.evaluate_image_gain`, or a source whose name holds ``"/"``.
    """

    label = "Image gain"
    best = "max"
    evaluator = staticmethod(evaluate_image_gain)

    def __init__(
        self,
        probe: ProbeLike,
        every_n_steps: int | None = 500,
        image_token_id: int | None = None,
        seed: int = 0,
        name: str = "image_gain",
        **options: Any,
    ) -> None:
        super().__init__(probe, every_n_steps, name=name, **options)
        self.engine = {"image_token_id": image_token_id, "seed": seed}

    def prepare(self, module: nn.Module) -> dict[str, Any]:
        """Find the model and see that the probe has pictures to exchange."""
        settings = super().prepare(module)
        assert self.network is not None
        network = Network(self.network, image_token_id=self.engine["image_token_id"])
        for source in Exchange(network, self.probe, self.engine["seed"]).sources:
            check_source(source or "")
        return settings

    def measure(self, loop: Loop) -> ImageGainResult:
        """Run the probe."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ProbeWarning)  # said at the start
            return super().measure(loop)

    def values(self, result: ImageGainResult) -> dict[str, float]:
        """Both gains, their standard errors, the loss, and the gain by source."""
        return {
            **self.monitored(result),
            f"{self.name}_se": result.standard_error,
            f"{self.name}_blank_se": result.standard_error_blank,
            f"{self.name}_probe/loss": result.loss,
            **{f"{self.name}_sources/{source}": found.gain for source, found in result.sources.items()},
        }

    def monitored(self, result: ImageGainResult) -> dict[str, float]:
        """Both gains."""
        return {self.name: result.gain, f"{self.name}_blank": result.gain_blank}

    def readings(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Gain with its standard error, and loss."""
        names = {"gain": self.name, "gain_error": f"{self.name}_se", "loss": f"{self.name}_probe/loss"}
        return {key: row[name] for key, name in names.items()}

    def draw(self, result: ImageGainResult, step: int) -> Drawing:
        """Both gains over all steps, with their intervals."""
        names = [f"{self.name}{end}" for end in ("", "_se", "_blank", "_blank_se", "_probe/loss")]
        rows = [[point["step"], *(point[name] for name in names)] for point in self.history]
        columns = ["step", "gain", "standard error", "gain over blank", "standard error over blank", "loss"]
        return {"curve": figures.gain_figure(rows)}, (columns, rows)
