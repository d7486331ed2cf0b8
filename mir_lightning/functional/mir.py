"""Modality Integration Rate of token sets: text-centric normalisation, outliers, distance, sum over layers.

Source: Huang et al., "Deciphering Cross-Modal Alignment in Large Vision-Language Models with Modality
Integration Rate" (arXiv 2410.07167), section 3, and its released ``mir.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mir_lightning.functional.checks import check_choice
from mir_lightning.functional.differentiable import token_frechet_distance
from mir_lightning.functional.frechet import Gaussian, frechet_gaps
from mir_lightning.functional.precision import full_float32

Variant = Literal["paper", "official", "official-fast"]


class LayerDistance(NamedTuple):
    """What one layer contributes to MIR; every field is a float64 scalar.

    Attributes:
        mean_gap: squared distance of the normalised means.
        cov_gap: the rest of the Fréchet distance.
        scale: the text-centric scale alpha, one over the mean norm of the text tokens.
        effective_rank: of vision and text tokens, ``[2]``.
        total_variance: of vision and text tokens after scaling, ``[2]``.
        tokens: vision and text tokens seen, outliers included, ``[2]``.
        outliers: vision and text tokens outside the 3-sigma rule, ``[2]``.
    """

    mean_gap: Tensor
    cov_gap: Tensor
    scale: Tensor
    effective_rank: Tensor
    total_variance: Tensor
    tokens: Tensor
    outliers: Tensor

    @property
    def distance(self) -> Tensor:
        """The Fréchet distance of the layer."""
        return self.mean_gap + self.cov_gap


def check_tokens(vision: Tensor, text: Tensor, layer: int) -> None:
    """Raise a clear error unless both are floating point ``[n, d]`` tensors of one width on one device."""
    for modality, tokens in (("vision", vision), ("text", text)):
        if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
            given = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"{modality} tokens of layer {layer} must be a floating point tensor, got {given}.")
        if tokens.ndim != 2:
            raise ValueError(f"{modality} tokens of layer {layer} must be [n, d], got {list(tokens.shape)}.")
    if vision.shape[1] != text.shape[1]:
        raise ValueError(
            f"vision and text tokens of layer {layer} must have one width, "
            f"got {vision.shape[1]} and {text.shape[1]}."
        )
    if vision.device != text.device:
        raise ValueError(
            f"vision and text tokens of layer {layer} must be on one device, "
            f"got {vision.device} and {text.device}."
        )


def norms_of(tokens: Tensor) -> Tensor:
    """L2 norms ``[n]`` of tokens ``[n, d]``, in float64."""
    return torch.linalg.vector_norm(tokens, dim=1, dtype=torch.float64)


def token_norms(modality: str, tokens: Tensor, layer: int) -> Tensor:
    """:func:`norms_of` tokens; a ``ValueError`` names the layer if any is not finite."""
    norms = norms_of(tokens)
    if not norms.isfinite().all():
        raise ValueError(
            f"{modality} hidden states of layer {layer} hold NaN or inf "
            f"({int((~norms.isfinite()).sum())} of {len(norms)} tokens): the model has diverged or overflowed."
        )
    return norms


def inlier_bounds(norms: Tensor) -> tuple[Tensor, Tensor]:
    """Median norm and the largest distance from it that is not an outlier (3 sigma), of norms ``[n]``, n >= 2.

    Lower median and unbiased standard deviation (method of the released code).
    """
    return norms.median(), 3 * norms.std()


def is_inlier(norms: Tensor, bounds: tuple[Tensor, Tensor] | tuple[float, float]) -> Tensor:
    """Boolean ``[n]``: which of ``norms`` lie within ``bounds`` as :func:`inlier_bounds` gives them."""
    median, margin = bounds
    return (norms - median).abs() <= margin


def text_scale(text_norms: Tensor, layer: int) -> Tensor:
    """Text-centric scale alpha: one over the mean norm of all text tokens, outliers included."""
    mean_norm = text_norms.mean()
    if mean_norm == 0:
        raise ValueError(f"text tokens of layer {layer} are all zero: no scale can be taken from them.")
    return mean_norm.reciprocal()


def check_count(modality: str, count: int, layer: int) -> None:
    """Raise a ``ValueError`` for fewer than two tokens: they have no covariance."""
    if count < 2:
        raise ValueError(
            f"{modality} has {count} token(s) in layer {layer}: a covariance needs at least 2. "
            "Use a probe with more samples, and check its masks."
        )


def layer_distance(
    vision: Gaussian, text: Gaussian, scale: Tensor, tokens: Sequence[int], outliers: Sequence[int]
) -> LayerDistance:
    """Distance of two unscaled Gaussians after text-centric normalisation by ``scale``.

    Scaling the tokens scales squared distances and variances by its square, and leaves ranks as they are.
    """
    mean_gap, cov_gap = frechet_gaps(vision, text)
    return LayerDistance(
        mean_gap * scale**2,
        cov_gap * scale**2,
        scale,
        torch.stack([vision.effective_rank, text.effective_rank]),
        torch.stack([vision.total_variance, text.total_variance]) * scale**2,
        torch.tensor(tokens, dtype=torch.float64),
        torch.tensor(outliers, dtype=torch.float64),
    )


class CleanTokens(NamedTuple):
    """Tokens of one layer after the outlier rule, not yet scaled.

    Attributes:
        vision: ``[n_v, d]``.
        text: ``[n_t, d]``.
        scale: the text-centric scale alpha, float64 scalar.
        tokens: numbers of vision and text tokens, outliers included.
        outliers: numbers of vision and text outliers.
    """

    vision: Tensor
    text: Tensor
    scale: Tensor
    tokens: list[int]
    outliers: list[int]


def clean_tokens(vision: Tensor, text: Tensor, variant: Variant, layer: int) -> CleanTokens:
    """Apply the outlier rule of ``variant`` to tokens ``[n_v, d]`` and ``[n_t, d]`` of one layer."""
    norms, cleaned, outliers = [], [], []
    for modality, tokens in (("vision", vision), ("text", text)):
        check_count(modality, len(tokens), layer)
        norms.append(token_norms(modality, tokens, layer))
        inlier = is_inlier(norms[-1], inlier_bounds(norms[-1]))
        outliers.append(int((~inlier).sum()))
        cleaned.append(tokens[inlier] if variant == "paper" else _replace(tokens, inlier))
        check_count(modality, len(cleaned[-1]), layer)
    return CleanTokens(cleaned[0], cleaned[1], text_scale(norms[1], layer), [len(n) for n in norms], outliers)


def token_layer_distance(vision: Tensor, text: Tensor, variant: Variant, layer: int) -> LayerDistance:
    """Distance of one layer's tokens ``[n_v, d]``, ``[n_t, d]``, all of them at hand."""
    clean = clean_tokens(vision, text, variant, layer)
    gaussians = [Gaussian.from_tokens(tokens) for tokens in (clean.vision, clean.text)]
    result = layer_distance(gaussians[0], gaussians[1], clean.scale, clean.tokens, clean.outliers)
    return result._replace(cov_gap=_five_step_cov_gap(clean, layer)) if variant == "official-fast" else result


def _replace(tokens: Tensor, inlier: Tensor) -> Tensor:
    """Put the coordinate-wise (lower) median of all tokens in the place of each outlier."""
    return torch.where(inlier[:, None], tokens, tokens.median(dim=0).values)


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
            mean_gap = (vision.mean - text.mean).square().sum()
            return mean_gap * clean.scale**2 + _five_step_cov_gap(clean, layer)
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
        variant: ``"paper"`` removes outliers; ``"official"`` replaces them by the coordinate-wise median, as
            the released code does; ``"official-fast"`` also takes the released default's float32 cross term.
        return_layers: also return the Fréchet distances by layer.
        differentiable: back-propagate through the result to the tokens, so that MIR can serve as an auxiliary
            loss; for ``"paper"`` and ``"official"``. Which tokens are outliers is held constant. Takes longer
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
        raise ValueError('differentiable=True takes variant "paper" or "official", got "official-fast".')
    distances = []
    for layer, (v, t) in enumerate(zip(vision, text, strict=True)):
        check_tokens(v, t, layer)
        clean = clean_tokens(v, t, variant, layer)
        distances.append(_distance(clean, variant, layer, differentiable))
    layers = torch.stack(distances)
    mir = layers.sum().log10()
    return (mir, layers) if return_layers else mir
