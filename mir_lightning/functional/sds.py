"""Soft Discrimination Score: how much a model prefers the right answer to its distractors.

Source: RADAR (arXiv 2602.12892) and its released evaluation code.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mir_lightning.functional.checks import check_choice, check_floating

Reduction = Literal["mean", "none"]


def soft_discrimination_score(scores: Sequence[Tensor], reduction: Reduction = "mean") -> Tensor:
    r"""Soft Discrimination Score of multiple-choice items; higher is better, 1 is the most.

    .. math:: \mathrm{SDS} = \frac{1}{n} \sum_{i=1}^{n} \frac{\exp s_{i0}}{\sum_{c} \exp s_{ic}}

    where :math:`s_{ic}` is the score of candidate c of item i, for example the mean logit of its tokens, and
    candidate 0 is the right answer. A model that cannot tell the candidates apart gets one over their number.

    Args:
        scores: one tensor ``[candidates]`` an item, at least two candidates each; the right answer comes first.
        reduction: ``"mean"`` over the items, or ``"none"``.

    Returns:
        A float64 scalar; with ``"none"`` the probabilities of the right answers, ``[items]``.

    Raises:
        TypeError: for scores that are not floating point tensors.
        ValueError: without items, for an item that is not ``[candidates]`` or has fewer than two of them, for
            scores that are not finite, or an unknown reduction.

    Example:
        >>> import torch
        >>> round(soft_discrimination_score([torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0, 0.0])]).item(), 3)
        0.607
    """
    check_choice("reduction", reduction, Reduction)
    probabilities = candidate_matrix(scores).softmax(dim=1)[:, 0]
    return probabilities.mean() if reduction == "mean" else probabilities


def right_shares(scores: Sequence[Tensor]) -> Tensor:
    """Which items the best candidate gets right, float64 ``[items]``; see :func:`soft_discrimination_score`.

    1 where the right answer scores best, 0 where another does; where k candidates share the best score with it,
    1/k: what a coin would get, so that equal scores stay at the chance level.
    """
    matrix = candidate_matrix(scores)
    best = matrix == matrix.max(dim=1, keepdim=True).values
    return best[:, 0] / best.sum(dim=1, dtype=torch.float64)


def candidate_matrix(scores: Sequence[Tensor]) -> Tensor:
    """Checked scores as a float64 ``[items, candidates]``; ``-inf`` where an item has fewer candidates."""
    if isinstance(scores, Tensor) and scores.ndim < 2:
        raise ValueError(f"scores must hold one tensor [candidates] an item, got one tensor {list(scores.shape)}.")
    if not len(scores):
        raise ValueError("scores is empty: at least one item is needed.")
    for item, of_item in enumerate(scores):
        check_floating(f"scores of item {item}", of_item, " [candidates]")
        if of_item.ndim != 1 or len(of_item) < 2:
            raise ValueError(
                f"scores of item {item} must be [candidates] with at least 2 (the right answer and a distractor), "
                f"got {list(of_item.shape)}."
            )
        if not of_item.isfinite().all():
            raise ValueError(f"scores of item {item} hold NaN or inf: {of_item.tolist()}.")
    return pad_sequence([s.double() for s in scores], batch_first=True, padding_value=float("-inf"))
