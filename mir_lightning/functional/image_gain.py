"""Image gain: what the right picture is worth to a model that reads its text.

Source: visual information gain (arXiv 2602.17186).
"""

import torch
from torch import Tensor

from mir_lightning.functional.checks import check_floating


def image_gain(
    right: Tensor, wrong: Tensor, tokens: Tensor, return_standard_error: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    r"""How much likelier a model finds texts with their own picture than with a wrong one, in nats a token.

    .. math:: g = \frac{\sum_i (w_i - r_i)}{\sum_i t_i}

    Higher is better; 0 means that the model does not look at the pictures. Over samples, which are drawn
    independently of each other, the standard error of this ratio is
    :math:`\sqrt{\frac{N}{N-1} \sum_i (w_i - r_i - g\,t_i)^2} \,/ \sum_i t_i` (linearisation).

    Args:
        right: cross-entropy of each sample's labelled tokens with its own picture, summed, ``[N]`` in nats.
        wrong: the same with a wrong picture, ``[N]``.
        tokens: number of labelled tokens of each sample, ``[N]``.
        return_standard_error: whether to give the standard error as well.

    Returns:
        The gain, a float64 scalar; with ``return_standard_error`` also its standard error, NaN for one sample
        alone, which tells nothing of how samples differ.

    Raises:
        TypeError: for losses that are not floating point tensors.
        ValueError: without samples, for other shapes, losses that are not finite, or a sample without tokens.

    Example:
        >>> import torch
        >>> right, wrong = torch.tensor([4.0, 6.0]), torch.tensor([5.0, 9.0])
        >>> gain, error = image_gain(right, wrong, torch.tensor([2, 2]), return_standard_error=True)
        >>> gain.item(), error.item()
        (1.0, 0.5)
    """
    losses = sample_losses(tokens, right=right, wrong=wrong)
    difference, count = losses[:, 1] - losses[:, 0], losses[:, 2]
    gain = difference.sum() / count.sum()
    if not return_standard_error:
        return gain
    samples = len(count)
    spread = (difference - gain * count).square().sum() * samples / (samples - 1 or torch.nan)
    return gain, spread.sqrt() / count.sum()


def sample_losses(tokens: Tensor, **losses: Tensor) -> Tensor:
    """Checked losses by name and ``tokens`` as the columns of a float64 ``[N, losses + 1]``; see above."""
    for name, values in losses.items():
        check_floating(name, values, " [N]")
        if values.ndim != 1 or not len(values) or values.shape != tokens.shape:
            raise ValueError(
                f"{name} and tokens must both be [N], a number for each of at least one sample, got "
                f"{list(values.shape)} and {list(tokens.shape)}."
            )
        if not values.isfinite().all():
            raise ValueError(f"{name} holds NaN or inf at sample {int((~values.isfinite()).nonzero()[0])}.")
    if not (tokens > 0).all():
        raise ValueError("tokens must be above 0: leave out samples without labelled tokens.")
    return torch.stack([values.double() for values in (*losses.values(), tokens)], dim=1)
