r"""What each token, and so each sample, adds to MIR; and from it how sure a MIR is.

The influence of a token is the derivative of MIR by its weight. With the transport map M from the Gaussian of the
vision tokens to that of the text tokens, a vision token at ``c`` from the mean adds

.. math:: 2 c \cdot (\mu_v - \mu_t) / n_v + (c^T (I - M) c - \mathrm{Tr}((I - M) S_v)) / (n_v - 1)

to a layer's Fréchet distance, a text token the same with ``M⁻¹`` (pseudo-inverses where rank is lost), and by its
norm it moves the text-centric scale. Which tokens are outliers is held fixed. Source: the derivative of the
Fréchet distance; the infinitesimal jackknife (Jaeckel, 1972; Efron, 1982).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mir_lightning.functional.checks import check_choice
from mir_lightning.functional.frechet import Gaussian
from mir_lightning.functional.mir import Rule, check_tokens, clean_tokens, judge, kept_by, mean_norms, norms_of


class LayerInfluence:
    """Derivatives of one layer's Fréchet distance by the weights of its tokens.

    Holds two matrices ``[d, d]`` in float64.

    Args:
        gaussians: of the vision and the text tokens that the rule keeps, unscaled.
        norms: of all vision and all text tokens, ``[n_v]``, ``[n_t]``.
        rule: the outlier rule.
        layer: its number, for messages.
    """

    def __init__(
        self, gaussians: tuple[Gaussian, Gaussian], norms: tuple[Tensor, Tensor], rule: Rule, layer: int
    ) -> None:
        vision, text = gaussians
        left, singular, right = torch.linalg.svd(vision.factor.T @ text.factor, full_matrices=False)
        gap, cross = vision.mean - text.mean, singular.sum()
        traces = vision.total_variance, text.total_variance
        self.rules, self.rule = [judge(of_tokens) for of_tokens in norms], rule
        kept = [int(kept_by(rule, rules.classes(n)).sum()) for rules, n in zip(self.rules, norms, strict=True)]
        _, self.text_norm = mean_norms(*norms, layer)
        self.text_count = len(norms[1])
        self.distance = ((gap.square().sum() + sum(traces) - 2 * cross) / self.text_norm**2).clamp(min=0)
        # cᵀ M c = |K c|², with K the root of the singular values times the rotated coordinates of unit variance.
        self.sides = [
            (g.mean, 2 * sign * gap / n, singular.sqrt()[:, None] * (basis @ g.inverse), trace - cross, n)
            for g, sign, basis, trace, n in zip(gaussians, (1, -1), (left.T, right), traces, kept, strict=True)
        ]

    def by_token(self, side: int, tokens: Tensor) -> Tensor:
        """Of vision tokens (``side`` 0) or text tokens (1) ``[n, d]``: what each adds, ``[n]`` float64."""
        norms, (mean, slope, root, surplus, count) = norms_of(tokens), self.sides[side]
        centred = tokens.double() - mean
        bent = centred.square().sum(dim=1) - (centred @ root.T).square().sum(dim=1) - surplus
        added = (centred @ slope + bent / (count - 1)) / self.text_norm**2
        added *= kept_by(self.rule, self.rules[side].classes(norms))
        if side == 1:
            added -= 2 * self.distance * (norms / self.text_norm - 1) / self.text_count
        return added


def mir_influence(
    vision: Sequence[Tensor],
    text: Sequence[Tensor],
    vision_samples: Tensor,
    text_samples: Tensor,
    variant: Rule = "paper",
) -> Tensor:
    """What each sample adds to MIR: the derivative of MIR by the sample's weight.

    Args:
        vision: L tensors ``[n_v, d]``, as for :func:`~mir_lightning.functional.modality_integration_rate`.
        text: L tensors ``[n_t, d]``.
        vision_samples: ``[n_v]``, the sample that each vision token is of, counted from 0.
        text_samples: ``[n_t]``.
        variant: ``"paper"`` or ``"robust"``; others replace tokens, and have no influence function here.

    Returns:
        ``[N]``, float64. A positive one: without the sample, MIR would be lower.

    Raises:
        TypeError: for tokens that are not floating point tensors.
        ValueError: as ``modality_integration_rate`` does; for another variant.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> vision = [torch.randn(60, 4, generator=generator) + 1]
        >>> text = [torch.randn(40, 4, generator=generator)]
        >>> influence = mir_influence(vision, text, torch.arange(60) // 3, torch.arange(40) // 2)
        >>> influence.shape, round(standard_error(influence).item(), 3)
        (torch.Size([20]), 0.122)
    """
    check_choice("variant", variant, Rule)
    for name, of_samples, tokens in (("vision", vision_samples, vision[0]), ("text", text_samples, text[0])):
        if of_samples.shape != tokens.shape[:1]:
            raise ValueError(
                f"{name}_samples must name a sample for each of the {len(tokens)} tokens, "
                f"got shape {list(of_samples.shape)}."
            )
    samples = int(max(vision_samples.max(), text_samples.max())) + 1
    added, total = torch.zeros(samples, dtype=torch.float64, device=vision[0].device), 0.0
    for index, sides in enumerate(zip(vision, text, strict=True)):
        check_tokens(*sides, index)
        clean = clean_tokens(*sides, variant, index)
        gaussians = Gaussian.from_tokens(clean.vision), Gaussian.from_tokens(clean.text)
        layer = LayerInfluence(gaussians, (norms_of(sides[0]), norms_of(sides[1])), variant, index)
        for side, of_samples in enumerate((vision_samples, text_samples)):
            added.index_add_(0, of_samples, layer.by_token(side, sides[side]))
        total += layer.distance.item()
    return added / (total * math.log(10))


def standard_error(influence: Tensor) -> Tensor:
    """Standard error of MIR over redrawn samples, from what each of them adds ``[N]``, N >= 2.

    Of the difference of two models on the same samples: that of the difference of their influences.
    """
    count = len(influence)
    if count < 2:
        raise ValueError(f"influence has {count} sample(s): a standard error needs at least 2.")
    return (count / (count - 1) * influence.square().sum()).sqrt()
