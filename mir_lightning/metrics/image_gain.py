"""Image gain over a stream of samples, as a torchmetrics Metric."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from mir_lightning.functional.image_gain import image_gain, sample_losses
from mir_lightning.metrics.base import PreciseMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Gains(NamedTuple):
    """What pictures are worth, in nats a token."""

    gain: float  # against other pictures
    standard_error: float  # of it, over samples
    gain_blank: float  # against blank pictures
    standard_error_blank: float
    loss: float  # mean cross-entropy with the right pictures
    tokens: int  # labelled ones
    samples: Tensor  # gain of each sample, float64 [N], in the order in which they were added
    samples_blank: Tensor  # the same against blank pictures


class ImageGain(PreciseMetric):
    """What the right picture is worth to a model, in nats a token; higher is better, 0 means it does not look.

    Source: visual information gain (arXiv 2602.17186); see :func:`~mir_lightning.functional.image_gain`.

    Args:
        kwargs: as every torchmetrics Metric takes them.

    Example:
        >>> import torch
        >>> metric = ImageGain()
        >>> right, other, blank = torch.tensor([4.0, 6.0]), torch.tensor([5.0, 9.0]), torch.tensor([8.0, 10.0])
        >>> metric.update(right, other, blank, tokens=torch.tensor([2, 2]))
        >>> metric.compute().item(), metric.compute_breakdown().gain_blank
        (1.0, 2.0)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._merged: Tensor | None = None  # [N, 4] of all ranks, as compute() last saw it
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, right: Tensor, other: Tensor, blank: Tensor, tokens: Tensor) -> None:
        """Add samples.

        Args:
            right: cross-entropy of each sample's labelled tokens with its own picture, summed, ``[N]`` in nats.
            other: the same with another sample's picture, ``[N]``.
            blank: the same with a picture of one colour, ``[N]``.
            tokens: number of labelled tokens of each sample, ``[N]``.

        Raises:
            TypeError: for losses that are not floating point tensors.
            ValueError: without samples, for other shapes, losses that are not finite, or a sample without tokens.
                Nothing has been added then.
        """
        self.rows.append(sample_losses(tokens, right=right, other=other, blank=blank).detach().to(self.device))

    def compute(self) -> Tensor:
        """Gain against other pictures, a float64 scalar.

        Raises:
            ValueError: without any sample.
        """
        rows = dim_zero_cat(self.rows) if len(self.rows) else torch.zeros(0, 4)
        if not len(rows):
            raise ValueError("no sample has been added: call update with the losses of at least one.")
        self._merged = rows
        right, other, _, tokens = rows.unbind(dim=1)
        return image_gain(right, other, tokens)  # type: ignore[return-value]

    def compute_breakdown(self) -> Gains:
        """Both gains with their standard errors, the loss, and the gains of the samples."""
        self.compute()
        assert self._merged is not None
        right, other, blank, tokens = self._merged.cpu().unbind(dim=1)
        (gain, error), (gain_blank, error_blank) = (image_gain(right, x, tokens, True) for x in (other, blank))
        return Gains(
            gain.item(),
            error.item(),
            gain_blank.item(),
            error_blank.item(),
            loss=(right.sum() / tokens.sum()).item(),
            tokens=int(tokens.sum()),
            samples=(other - right) / tokens,
            samples_blank=(blank - right) / tokens,
        )

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        """A rank without samples takes part with none; torchmetrics would give it another shape and dtype."""
        self.rows = self.rows or [torch.zeros(0, 4, dtype=torch.float64, device=self.device)]
        super()._sync_dist(*args, **kwargs)

    def _draw(self, ax: "Axes") -> None:
        found = self.compute_breakdown()
        for gains, label in ((found.samples, "another picture"), (found.samples_blank, "a blank picture")):
            ax.plot(gains.sort().values, torch.linspace(0, 1, len(gains)), "o-", markersize=3, label=label)
        ax.axvline(0, color="k", linewidth=0.8)
        ax.set(xlabel="image gain of a sample (nats a token, higher is better)", ylabel="share of the samples")
