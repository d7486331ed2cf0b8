"""Modality Integration Rate of token sets: text-centric normalisation, outliers, distance, sum over layers.

Source: Huang et al., "Deciphering Cross-Modal Alignment in Large Vision-Language Models with Modality
Integration Rate" (arXiv 2410.07167), section 3, and its released ``mir.py``.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mir_lightning.functional.checks import check_choice, check_floating
from mir_lightning.functional.frechet import (
    Gaussian,
    RankOrder,
    cross_trace,
    frechet_gaps,
    full_float32,
    token_frechet_distance,
)

Variant = Literal["paper", "robust", "official", "official-fast"]
Rule = Literal["paper", "robust"]

BOTH, PAPER_ONLY, ROBUST_ONLY, NEITHER = range(4)
"""Classes of tokens by the outlier rules that keep them."""
KEPT: dict[Rule, tuple[int, int]] = {"paper": (BOTH, PAPER_ONLY), "robust": (BOTH, ROBUST_ONLY)}
"""Classes that a rule keeps."""

_NORMAL = 1.4826  # of a normal distribution: standard deviation over median absolute deviation
_LEAST_SPREAD = 0.02


class LayerDistance(NamedTuple):
    """What one layer contributes to MIR, in float64: scalars, or ``[2]`` of vision and text tokens."""

    mean_gap: Tensor  # squared distance of the normalised means
    cov_gap: Tensor  # the rest of the Fréchet distance
    scale: Tensor  # the text-centric scale alpha, one over the mean norm of the text tokens
    norm_ratio: Tensor  # mean norm of the vision tokens over that of the text tokens, outliers included
    equal_norm: Tensor  # the Fréchet distance with each modality scaled to mean norm 1: the gap but for loudness
    effective_rank: Tensor  # [2]
    total_variance: Tensor  # [2], after scaling
    tokens: Tensor  # [2], numbers of tokens seen, outliers included
    outliers: Tensor  # [2], how many of them are outside the outlier rule of the variant
    robust: Tensor  # the Fréchet distance of variant "robust"
    massive: Tensor  # [2], how many tokens are outside the robust rule

    @property
    def distance(self) -> Tensor:
        """The Fréchet distance of the layer."""
        return self.mean_gap + self.cov_gap


def check_tokens(vision: Tensor, text: Tensor, layer: int) -> None:
    """Raise a clear error unless both are floating point ``[n, d]`` tensors of one width on one device."""
    for modality, tokens in (("vision", vision), ("text", text)):
        check_floating(f"{modality} tokens of layer {layer}", tokens)
        if tokens.ndim != 2:
            raise ValueError(f"{modality} tokens of layer {layer} must be [n, d], got {list(tokens.shape)}.")
    for wanted, of_vision, of_text in (
        ("have one width", vision.shape[1], text.shape[1]),
        ("be on one device", vision.device, text.device),
    ):
        if of_vision != of_text:
            raise ValueError(
                f"vision and text tokens of layer {layer} must {wanted}, got {of_vision} and {of_text}."
            )


def norms_of(tokens: Tensor) -> Tensor:
    """L2 norms ``[n]`` of tokens ``[n, d]``, in float64."""
    return torch.linalg.vector_norm(tokens, dim=1, dtype=torch.float64)


def check_finite(modality: str, norms: Tensor, layer: int) -> None:
    """Raise a ``ValueError`` that names the layer if any of its tokens' ``norms`` is not finite."""
    if not norms.isfinite().all():
        raise ValueError(
            f"{modality} hidden states of layer {layer} hold NaN or inf "
            f"({int((~norms.isfinite()).sum())} of {len(norms)} tokens): the model has diverged or overflowed."
        )


class OutlierRules(NamedTuple):
    """Which norms are outliers, by both rules: those further than a margin from the median."""

    median: Tensor  # of all norms, the lower one
    paper: Tensor  # margin of the MIR paper's rule, 3 sigma
    robust: Tensor  # margin of the same rule with a sigma that outliers cannot inflate

    @property
    def margin(self) -> Tensor:
        """The narrower of the two."""
        return torch.minimum(self.paper, self.robust)

    def offsets(self, norms: Tensor) -> Tensor:
        """Distances of ``norms`` ``[n]`` from the median."""
        return (norms - self.median).abs()

    def classes(self, norms: Tensor) -> Tensor:
        """uint8 ``[n]``: whether both rules keep a token, only one does, or neither."""
        offsets = self.offsets(norms)
        return (offsets > self.robust).byte() * PAPER_ONLY + (offsets > self.paper).byte() * ROBUST_ONLY


def judge(norms: Tensor) -> OutlierRules:
    """The outlier rules that norms ``[n]``, n >= 2, set for themselves.

    *paper*: 3 sigma around the lower median, sigma the unbiased standard deviation (released code). Many massive
    tokens inflate sigma until the rule misses them (masking).

    *robust*: sigma is 1.4826 times the median absolute deviation (Hampel's identifier; lower medians), which
    anything less than half of the tokens cannot move; but at least 2 % of the median, so that tokens that are
    nearly alike are not outliers for being less alike. Where the deviation is 0, more than half of the norms are
    equal and it tells nothing: the paper's sigma.
    """
    median = norms.median()
    paper = 3 * norms.std()
    deviation = (norms - median).abs().median()
    spread = torch.maximum(_NORMAL * deviation, _LEAST_SPREAD * median)
    return OutlierRules(median, paper, torch.where(deviation > 0, 3 * spread, paper))


def kept_by(rule: Rule, classes: Tensor) -> Tensor:
    """Boolean ``[n]``: which tokens of these classes a rule keeps."""
    both, only = KEPT[rule]
    return (classes == both) | (classes == only)


def rule_of(variant: Variant) -> Rule:
    """The outlier rule of a variant."""
    return "robust" if variant == "robust" else "paper"


def mean_norms(vision_norms: Tensor, text_norms: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Mean norms of a layer's tokens, outliers included; one over the text's is the text-centric scale alpha."""
    if (text := text_norms.mean()) == 0:
        raise ValueError(f"text tokens of layer {layer} are all zero: no scale can be taken from them.")
    return vision_norms.mean(), text


def check_count(modality: str, count: int, layer: int) -> None:
    """Raise a ``ValueError`` for fewer than two tokens: they have no covariance."""
    if count < 2:
        raise ValueError(
            f"{modality} has {count} token(s) in layer {layer}: a covariance needs at least 2. "
            "Use a probe with more samples, and check its masks."
        )


def layer_distance(
    own: tuple[Gaussian, Gaussian],
    robust: tuple[Gaussian, Gaussian],
    norms: tuple[Tensor, Tensor],
    tokens: Sequence[int],
    outliers: Sequence[int],
    massive: Sequence[int],
    rank_order: RankOrder = 2,
) -> LayerDistance:
    """Distance of unscaled Gaussians of vision and text after text-centric normalisation.

    ``own`` are of the tokens that the variant keeps, ``robust`` of those that the robust rule keeps: the same
    object where they are the same tokens. ``norms`` are :func:`mean_norms`; the rest is for the
    :class:`LayerDistance`.
    """
    scale, ratio, cross = norms[1].reciprocal(), norms[0] / norms[1], cross_trace(*own)
    mean_gap, cov_gap = frechet_gaps(*own, (scale, scale), cross)
    distance = mean_gap + cov_gap if robust is own else torch.stack(frechet_gaps(*robust, (scale, scale))).sum()
    alike = (torch.where(ratio > 0, scale / ratio, 0.0), scale)
    return LayerDistance(
        mean_gap,
        cov_gap,
        scale,
        ratio,
        torch.stack(frechet_gaps(*own, alike, cross)).sum(),
        torch.stack([gaussian.effective_rank(rank_order) for gaussian in own]),
        torch.stack([gaussian.total_variance for gaussian in own]) * scale**2,
        torch.tensor(tokens, dtype=torch.float64),
        torch.tensor(outliers, dtype=torch.float64),
        distance,
        torch.tensor(massive, dtype=torch.float64),
    )


class CleanTokens(NamedTuple):
    """Tokens of one layer after the outlier rule, not yet scaled."""

    vision: Tensor  # [n_v, d]
    text: Tensor  # [n_t, d]
    norms: tuple[Tensor, Tensor]  # mean norms, outliers included
    tokens: list[int]  # numbers of vision and text tokens, outliers included
    outliers: list[int]

    @property
    def scale(self) -> Tensor:
        """The text-centric scale alpha."""
        return self.norms[1].reciprocal()


def clean_tokens(vision: Tensor, text: Tensor, variant: Variant, layer: int) -> CleanTokens:
    """Apply the outlier rule of ``variant`` to tokens ``[n_v, d]`` and ``[n_t, d]`` of one layer.

    The official variants put the coordinate-wise (lower) median of all tokens in the place of each outlier.
    """
    norms, cleaned, outliers = [], [], []
    for modality, tokens in (("vision", vision), ("text", text)):
        check_count(modality, len(tokens), layer)
        norms.append(norms_of(tokens))
        check_finite(modality, norms[-1], layer)
        kept = kept_by(rule_of(variant), judge(norms[-1]).classes(norms[-1]))
        outliers.append(int((~kept).sum()))
        if variant.startswith("official"):
            cleaned.append(torch.where(kept[:, None], tokens, tokens.median(dim=0).values))
        else:
            cleaned.append(tokens[kept])
            check_count(modality, len(cleaned[-1]), layer)
    means = mean_norms(norms[0], norms[1], layer)
    return CleanTokens(cleaned[0], cleaned[1], means, [len(n) for n in norms], outliers)


def official_layer_distance(
    vision: Tensor, text: Tensor, variant: Variant, layer: int, rank_order: RankOrder = 2
) -> LayerDistance:
    """Distance of one layer's tokens ``[n_v, d]``, ``[n_t, d]`` by an official variant; it needs all of them."""
    clean, robust = (clean_tokens(vision, text, kind, layer) for kind in (variant, "robust"))
    own, others = (
        (Gaussian.from_tokens(tokens.vision), Gaussian.from_tokens(tokens.text)) for tokens in (clean, robust)
    )
    counts = clean.tokens, clean.outliers, robust.outliers
    result = layer_distance(own, others, clean.norms, *counts, rank_order)
    return result._replace(cov_gap=_five_step_cov_gap(clean, layer)) if variant == "official-fast" else result


def _five_step_cov_gap(clean: CleanTokens, layer: int) -> Tensor:
    """Covariance gap as the released code's default mode has it, in its float32 arithmetic.

    Five steps of ``Y <- (Y + Z⁻¹ A) / 2``, ``Z <- (Z + Y⁻¹ A) / 2`` from ``Y = A``, ``Z = I``. In exact
    arithmetic they stay where they start, so this subtracts ``2 Tr(A)`` instead of ``2 Tr(A^(1/2))``.
    """
    vision, text = (tokens.float() * clean.scale.float() for tokens in (clean.vision, clean.text))
    with full_float32(vision.device):
        cov_vision, cov_text = (torch.cov(tokens.T).reshape(tokens.shape[1], -1) for tokens in (vision, text))
        product = cov_vision @ cov_text
        root, other = product, torch.eye(len(product), dtype=product.dtype, device=product.device)
        try:
            for _ in range(5):
                root = (root + torch.linalg.inv(other) @ product) / 2
                other = (other + torch.linalg.inv(root) @ product) / 2
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f'variant "official-fast" inverts the covariance product of layer {layer}, which is singular '
                f"({len(vision)} vision and {len(text)} text tokens of width {len(product)}): give it more "
                'tokens, or use "official" or "paper".'
            ) from error
    return (cov_vision.trace() + cov_text.trace() - 2 * root.trace()).double()


def _distance(clean: CleanTokens, variant: Variant, layer: int, differentiable: bool) -> Tensor:
    """Fréchet distance of one layer alone, without the ranks beside it."""
    if differentiable:
        return token_frechet_distance(clean.vision, clean.text) * clean.scale**2
    with torch.no_grad():
        vision, text = (Gaussian.from_tokens(tokens) for tokens in (clean.vision, clean.text))
        if variant == "official-fast":
            return (vision.mean - text.mean).square().sum() * clean.scale**2 + _five_step_cov_gap(clean, layer)
        return torch.stack(frechet_gaps(vision, text)).sum() * clean.scale**2


def modality_integration_rate(
    vision: Sequence[Tensor],
    text: Sequence[Tensor],
    variant: Variant = "paper",
    return_layers: bool = False,
    differentiable: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Modality Integration Rate of the tokens of L layers; lower is better aligned.

    .. math:: \mathrm{MIR} = \log_{10} \sum_{k=1}^{L} \mathrm{FD}(\omega(\alpha_k V_k), \omega(\alpha_k T_k))

    with the text-centric scale :math:`\alpha_k` and the 3-sigma outlier rule :math:`\omega` on token norms
    (MIR paper, section 3). Everything is computed in float64.

    Args:
        vision: L tensors ``[n_v, d]``: the vision tokens' hidden states after each decoder layer.
        text: L tensors ``[n_t, d]``.
        variant: ``"paper"`` removes outliers; ``"robust"`` does so by a rule that many massive activations cannot
            mask (see :func:`judge`); ``"official"`` replaces them by the coordinate-wise median, as
            the released code does; ``"official-fast"`` also takes the released default's float32 cross term.
        return_layers: also return the Fréchet distances by layer.
        differentiable: back-propagate through the result to the tokens, so that MIR can serve as an auxiliary
            loss; not for ``"official-fast"``. Which tokens are outliers is held constant. Takes longer
            (a singular value decomposition a layer); otherwise the result carries no gradient.

    Returns:
        A float64 scalar, or ``(scalar, [L])``. ``-inf`` where both modalities are the same tokens.

    Raises:
        TypeError: for tokens that are not floating point tensors.
        ValueError: for shapes or devices that do not fit, fewer than two tokens of a modality, non-finite
            tokens (naming the layer), or an unknown variant.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> vision = [torch.randn(64, 8, generator=generator) + 1 for _ in range(3)]
        >>> text = [torch.randn(48, 8, generator=generator) for _ in range(3)]
        >>> round(modality_integration_rate(vision, text).item(), 3)
        0.643
    """
    check_choice("variant", variant, Variant)
    if len(vision) != len(text) or not len(vision):
        raise ValueError(
            f"vision and text must hold the same number of layers, at least one, "
            f"got {len(vision)} and {len(text)}."
        )
    if differentiable and variant == "official-fast":
        raise ValueError('differentiable=True takes variant "paper", "robust" or "official", got "official-fast".')
    distances = []
    for layer, (v, t) in enumerate(zip(vision, text, strict=True)):
        check_tokens(v, t, layer)
        clean = clean_tokens(v, t, variant, layer)
        distances.append(_distance(clean, variant, layer, differentiable))
    layers = torch.stack(distances)
    mir = layers.sum().log10()
    return (mir, layers) if return_layers else mir
