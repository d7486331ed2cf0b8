"""Fréchet distance between Gaussians, and the trace of the matrix square root inside it.

Everything is float64 and goes through *factors*: for covariances ``X = F Fᵀ`` and ``Y = G Gᵀ``

    Tr((X Y)^(1/2)) = sum of the singular values of Fᵀ G,

which holds at any rank, needs no complex arithmetic, and cannot go negative.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mir_lightning.functional.checks import check_choice

TraceMethod = Literal["auto", "exact"]

_EPS = torch.finfo(torch.float64).eps
_TRACE_TOLERANCE = 1e-10


class Gaussian(NamedTuple):
    """A normal distribution fitted to tokens.

    Attributes:
        mean: ``[d]``, float64.
        factor: ``[d, r]``, float64; the covariance is ``factor @ factor.T``.
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    def from_tokens(cls, tokens: Tensor) -> Gaussian:
        """Fit to ``tokens`` ``[n, d]``, n >= 2; the covariance has the ``n - 1`` denominator."""
        tokens = tokens.double()
        mean = tokens.mean(dim=0)
        factor = (tokens - mean).T / (len(tokens) - 1) ** 0.5
        if len(tokens) <= tokens.shape[1]:
            return cls(mean, factor)
        return cls(mean, covariance_factor(factor @ factor.T))

    @classmethod
    def from_moments(cls, mean: Tensor, cov: Tensor) -> Gaussian:
        """Take a mean ``[d]`` and a covariance ``[d, d]``."""
        return cls(mean.double(), covariance_factor(cov.double()))

    def scaled(self, scale: Tensor | float) -> Gaussian:
        """The distribution of ``scale * x``."""
        return Gaussian(self.mean * scale, self.factor * scale)

    @property
    def total_variance(self) -> Tensor:
        """Trace of the covariance."""
        return self.factor.square().sum()

    @property
    def effective_rank(self) -> Tensor:
        """``exp`` of the entropy of the normalised covariance eigenvalues (Roy and Vetterli, 2007).

        Between 1 (all variance in one direction) and the rank of the covariance. 0 where nothing varies.
        """
        eigenvalues = torch.linalg.eigvalsh(_small_gram(self.factor)).clamp(min=0)
        total = eigenvalues.sum()
        if total == 0:
            return torch.zeros_like(total)
        shares = eigenvalues / total
        return torch.special.entr(shares).sum().exp()


def covariance_factor(cov: Tensor) -> Tensor:
    """Factor a covariance ``[d, d]`` (float64) into ``F`` ``[d, r]`` with ``cov = F Fᵀ``.

    Cholesky where the matrix is safely positive definite; otherwise the eigenvectors, without those whose
    eigenvalue is rounding noise (below ``d * eps`` of the largest), since the square root magnifies noise.
    """
    cholesky, info = torch.linalg.cholesky_ex(cov)
    noise = len(cov) * _EPS
    if not info.any() and cholesky.diagonal().square().min() > noise * cov.diagonal().max():
        return cholesky
    eigenvalues, eigenvectors = torch.linalg.eigh(cov)
    kept = eigenvalues > noise * eigenvalues[-1]
    return eigenvectors[:, kept] * eigenvalues[kept].sqrt()


def _small_gram(matrix: Tensor) -> Tensor:
    """``M Mᵀ`` or ``Mᵀ M``, whichever is smaller."""
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def _nuclear_norm(matrix: Tensor) -> Tensor:
    """Sum of singular values, through the eigenvalues of the Gram matrix where those are accurate enough.

    The eigenvalues are several times cheaper than a singular value decomposition but carry an absolute error
    near ``eps * largest``, which ruins the square roots of small ones. The error this makes in the sum is
    estimated (independent errors above the noise, one-sided ones below it) and decides.
    """
    if matrix.numel() == 0:
        return matrix.new_zeros(())
    eigenvalues = torch.linalg.eigvalsh(_small_gram(matrix)).clamp(min=0)
    roots = eigenvalues.sqrt()
    noise = 4 * _EPS * eigenvalues[-1]
    noisy = eigenvalues <= noise
    error = (noise / (2 * roots[~noisy])).square().sum().sqrt() + noisy.sum() * noise.sqrt()
    if error <= _TRACE_TOLERANCE * roots.sum():
        return roots.sum()
    return torch.linalg.svdvals(matrix).sum()


def frechet_gaps(x: Gaussian, y: Gaussian) -> tuple[Tensor, Tensor]:
    """Split the Fréchet distance into ``(mean gap, covariance gap)``; they add up to it.

    The covariance gap is a small difference of large traces: what rounding leaves below zero is set to zero.
    """
    mean_gap = (x.mean - y.mean).square().sum()
    cross = _nuclear_norm(x.factor.T @ y.factor)
    return mean_gap, (x.total_variance + y.total_variance - 2 * cross).clamp(min=0)


def trace_sqrt_product(cov_x: Tensor, cov_y: Tensor, method: TraceMethod = "auto") -> Tensor:
    r"""Trace of the square root of a product of covariances, :math:`\mathrm{Tr}((XY)^{1/2})`.

    Args:
        cov_x: covariance ``[d, d]``, symmetric and positive semi-definite, of any rank.
        cov_y: covariance ``[d, d]``.
        method: ``"exact"`` factors both in float64 and sums the singular values of ``Fᵀ G``; ``"auto"``
            picks the best method for the device and size (today always ``"exact"``).

    Returns:
        A float64 scalar.

    Raises:
        TypeError: if an argument is not a floating point tensor.
        ValueError: for other shapes, non-finite values, or an unknown method.

    Example:
        >>> import torch
        >>> trace_sqrt_product(torch.diag(torch.tensor([4.0, 9.0])), torch.eye(2))
        tensor(5., dtype=torch.float64)
    """
    check_choice("method", method, TraceMethod)
    _check_covariances(cov_x, cov_y)
    return _nuclear_norm(covariance_factor(cov_x.double()).T @ covariance_factor(cov_y.double()))


def frechet_distance(
    mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor, method: TraceMethod = "auto"
) -> Tensor:
    r"""Squared Fréchet (2-Wasserstein) distance between two Gaussians.

    .. math:: \lVert\mu_x - \mu_y\rVert^2 + \mathrm{Tr}(X) + \mathrm{Tr}(Y) - 2\,\mathrm{Tr}((XY)^{1/2})

    Source: Dowson and Landau (1982), equation 16; MIR paper (arXiv 2410.07167), section 3.

    Args:
        mean_x: mean ``[d]``.
        cov_x: covariance ``[d, d]``, symmetric and positive semi-definite, of any rank.
        mean_y: mean ``[d]``.
        cov_y: covariance ``[d, d]``.
        method: see :func:`trace_sqrt_product`.

    Returns:
        A float64 scalar, zero or above.

    Raises:
        TypeError: if an argument is not a floating point tensor.
        ValueError: for other shapes, non-finite values, or an unknown method.

    Example:
        >>> import torch
        >>> mean, cov = torch.zeros(2), torch.eye(2)
        >>> frechet_distance(mean, cov, mean + 1, 4 * cov)
        tensor(4., dtype=torch.float64)
    """
    check_choice("method", method, TraceMethod)
    _check_covariances(cov_x, cov_y)
    for name, mean in (("mean_x", mean_x), ("mean_y", mean_y)):
        _check_floating(name, mean)
        if mean.shape != cov_x.shape[:1]:
            raise ValueError(f"{name} must have shape [{len(cov_x)}] to go with cov_x, got {list(mean.shape)}.")
    mean_gap, cov_gap = frechet_gaps(Gaussian.from_moments(mean_x, cov_x), Gaussian.from_moments(mean_y, cov_y))
    return mean_gap + cov_gap


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {given}.")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or inf in it.")


def _check_covariances(cov_x: Tensor, cov_y: Tensor) -> None:
    for name, cov in (("cov_x", cov_x), ("cov_y", cov_y)):
        _check_floating(name, cov)
        if cov.ndim != 2 or cov.shape[0] != cov.shape[1] or len(cov) == 0:
            raise ValueError(f"{name} must be a square matrix [d, d], got shape {list(cov.shape)}.")
    if cov_x.shape != cov_y.shape:
        raise ValueError(f"cov_x and cov_y must have one shape, got {list(cov_x.shape)} and {list(cov_y.shape)}.")
