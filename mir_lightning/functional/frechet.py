"""Fréchet distance between Gaussians, and the trace of the matrix square root inside it.

With *factors* ``X = F Fᵀ`` and ``Y = G Gᵀ`` of the covariances

    Tr((X Y)^(1/2)) = sum of the singular values of Fᵀ G = sum of the roots of the eigenvalues of Fᵀ Y F,

which holds at any rank, needs no complex arithmetic, cannot go negative, and has a stable gradient. Everything is
float64, but for the Newton-Schulz iteration.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mir_lightning.functional.checks import check_choice, check_floating

TraceMethod = Literal["auto", "exact", "newton_schulz"]
RankOrder = Literal[1, 2]

_EPS = torch.finfo(torch.float64).eps
_TRACE_TOLERANCE = 1e-10
_BLOCK = 256
_BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


class Gaussian:
    """A normal distribution, its covariance known as itself or as a factor.

    Args:
        mean: ``[d]``, float64.
        cov: covariance ``[d, d]``, float64.
        factor: ``[d, r]``, float64, with ``cov = factor @ factor.T``; enough without ``cov``.
        eps: relative rounding error of the entries of ``cov``.
    """

    def __init__(
        self, mean: Tensor, cov: Tensor | None = None, factor: Tensor | None = None, eps: float = _EPS
    ) -> None:
        self.mean, self.cov, self._eps = mean, cov, eps
        if factor is not None:
            self.factor = factor

    @classmethod
    def from_tokens(cls, tokens: Tensor) -> "Gaussian":
        """Fit to ``tokens`` ``[n, d]``, n >= 2; the covariance has the ``n - 1`` denominator.

        No more tokens than dimensions stay as they are: centred, they are the factor.
        """
        tokens = tokens.double()
        mean = tokens.mean(dim=0)
        factor = (tokens - mean).T / (len(tokens) - 1) ** 0.5
        return cls(mean, factor=factor) if len(tokens) <= tokens.shape[1] else cls(mean, factor @ factor.T)

    @cached_property
    def cholesky(self) -> Tensor | None:
        """Lower triangular factor, where the covariance is known and safely positive definite."""
        if self.cov is None:
            return None
        triangle, info = torch.linalg.cholesky_ex(self.cov)
        unsafe = info.any() or (triangle.diagonal().square() <= self._noise(1) * self.cov.diagonal()).any()
        return None if unsafe else triangle

    @cached_property
    def factor(self) -> Tensor:
        """``F`` ``[d, r]`` with ``cov = F Fᵀ``, without directions whose variance is rounding noise.

        A square root would magnify those. Entries of a covariance carry errors relative to their own size, so
        noise is told from signal after scaling every dimension to unit variance.
        """
        if self.cholesky is not None:
            return self.cholesky
        assert self.cov is not None
        deviations = self.cov.diagonal().clamp(min=0).sqrt()
        unit = torch.where(deviations > 0, deviations, 1.0)
        eigenvalues, eigenvectors = torch.linalg.eigh(self.cov / unit / unit[:, None])
        kept = eigenvalues > self._noise(eigenvalues[-1])
        return unit[:, None] * eigenvectors[:, kept] * eigenvalues[kept].sqrt()

    def _noise(self, largest: Tensor | float) -> Tensor | float:
        """Eigenvalues below this may be rounding: of the entries, and of a decomposition with this ``largest``."""
        return len(self.mean) ** 0.5 * (self._eps / 2 + _EPS * largest)

    @property
    def total_variance(self) -> Tensor:
        """Trace of the covariance."""
        return self.factor.square().sum() if self.cov is None else self.cov.trace()

    @cached_property
    def inverse(self) -> Tensor:
        """``[r, d]``, (pseudo-)inverse of the factor: takes a centred token to coordinates of unit variance."""
        if self.cholesky is not None:
            return torch.linalg.solve_triangular(
                self.cholesky, torch.eye(len(self.mean)).to(self.mean), upper=False
            )
        return torch.linalg.pinv(self.factor)

    def effective_rank(self, order: RankOrder = 2) -> Tensor:
        """``exp`` of the Rényi entropy of the normalised covariance eigenvalues.

        Between 1 (all variance in one direction) and the rank of the covariance; 0 where nothing varies. Order 2
        is the participation ratio ``Tr(S)² / ‖S‖²`` and needs no eigenvalues; order 1 is that of Roy and Vetterli
        (2007), also known as RankMe.
        """
        gram = _small_gram(self.factor) if self.cov is None else self.cov
        if (total := gram.trace()) <= 0:
            return torch.zeros_like(total)
        if order == 2:
            return total.square() / gram.square().sum()
        eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
        return torch.special.entr(eigenvalues / eigenvalues.sum()).sum().exp()


def cross_trace(x: Gaussian, y: Gaussian) -> Tensor:
    """``Tr((X Y)^(1/2))`` of two covariances, exact to float64 rounding at any rank."""
    if x.cholesky is not None and y.cov is not None:
        total = _trace_of_root(_triangular_congruence(x.cholesky, y.cov))
        if total is not None:
            return total
    matrix = x.factor.T @ y.factor
    if matrix.numel() == 0:
        return matrix.new_zeros(())
    total = _trace_of_root(_small_gram(matrix))
    return torch.linalg.svdvals(matrix).sum() if total is None else total


def _triangular_congruence(triangle: Tensor, cov: Tensor) -> Tensor:
    """Lower triangle of ``Lᵀ Y L`` for a lower triangular L; by blocks, without the zeros of L."""
    product, result = torch.empty_like(cov), torch.zeros_like(cov)
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(cov), _BLOCK)]
    for block in blocks:
        product[:, block] = cov[:, block.start :] @ triangle[block.start :, block]
    for block in blocks:
        result[block, : block.stop] = triangle[block.start :, block].T @ product[block.start :, : block.stop]
    return result


def _trace_of_root(gram: Tensor) -> Tensor | None:
    """Trace of the square root of a positive semi-definite matrix (its lower triangle), if accurate enough.

    Eigenvalues are several times cheaper than singular values of a factor but carry an absolute error near
    ``eps * largest``, which ruins the square roots of small ones. The error this makes in the sum is estimated
    (independent errors above the noise, one-sided ones below it) and decides.
    """
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
    roots = eigenvalues.sqrt()
    noise = 4 * _EPS * eigenvalues[-1]
    noisy = eigenvalues <= noise
    error = (noise / (2 * roots[~noisy])).square().sum().sqrt() + noisy.sum() * noise.sqrt()
    return roots.sum() if error <= _TRACE_TOLERANCE * roots.sum() else None


def _small_gram(matrix: Tensor) -> Tensor:
    """``M Mᵀ`` or ``Mᵀ M``, whichever is smaller."""
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No autocast on ``device``, and no TF32 or bfloat16 inside float32 matrix products; restored afterwards."""
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the backends' own attributes, which this getter refuses to summarise
        legacy = "highest"
    saved = [backend.fp32_precision for backend in _BACKENDS]
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for backend, precision in zip(_BACKENDS, saved, strict=True):
            backend.fp32_precision = precision


class NewtonSchulzTrace(NamedTuple):
    """What the iteration found; tensors are float64 scalars."""

    trace: Tensor  # Tr((X Y)^(1/2)), never above the exact value by more than float32 rounding
    error: Tensor  # bound of its relative error in exact arithmetic
    steps: int


def newton_schulz_trace(cov_x: Tensor, cov_y: Tensor, tolerance: float = 1e-5) -> NewtonSchulzTrace:
    r"""Trace of the square root of a product of covariances by a Newton-Schulz iteration in float32.

    With factors ``X = F Fᵀ``, ``Y = G Gᵀ`` (Cholesky; float64) the trace is ``max Tr(Uᵀ M)`` over orthogonal U
    for ``M = Fᵀ G``. The iteration ``U <- a U + b U Uᵀ U`` drives ``M / ‖M‖`` to that U. An error in U changes the
    trace to second order only, and the iteration corrects its own rounding, where the coupled iteration on
    ``X Y`` loses its inverse factor and overflows once spectra span eight decades.

    The coefficients follow the smallest singular value that still counts (Chen and Chow, 2014), which grows 2.6
    times a step; the iteration stops when every singular value above it has settled to within ``tolerance``.

    Args:
        cov_x: covariance ``[d, d]``.
        cov_y: covariance ``[d, d]``.
        tolerance: relative error to stop at, between 1e-6 (float32) and 1.

    Raises:
        TypeError: if a covariance is not a floating point tensor.
        ValueError: for other shapes, non-finite values, or a tolerance out of range.

    Example:
        >>> import torch
        >>> found = newton_schulz_trace(torch.diag(torch.tensor([4.0, 9.0])), torch.eye(2))
        >>> round(found.trace.item(), 4), found.error.item() < 1e-5
        (5.0, True)
    """
    _check_covariances(cov_x, cov_y)
    if not 1e-6 <= tolerance < 1:
        raise ValueError(f"tolerance must lie in 1e-6 .. 1, got {tolerance}.")
    x, y = (Gaussian(cov[0], cov) for cov in (cov_x.double(), cov_y.double()))  # means do not matter
    matrix = x.factor.T @ y.factor
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    norm = torch.linalg.matrix_norm(matrix)
    if matrix.numel() == 0 or norm == 0:
        return NewtonSchulzTrace(norm, norm, 0)
    neglected = tolerance / (2 * matrix.shape[1])
    polar, settled, steps = (matrix / norm).float(), neglected, 0
    with full_float32(matrix.device):
        while 1 - settled > tolerance / 2:
            scale = (3 / (1 + settled + settled**2)) ** 0.5
            polar = torch.addmm(polar, polar, polar.T @ polar, beta=1.5 * scale, alpha=-0.5 * scale**3)
            settled = 1.5 * scale * settled - 0.5 * (scale * settled) ** 3
            steps += 1
    trace = (polar * matrix).sum(dtype=torch.float64)
    error = (1 - settled) + matrix.shape[1] * neglected * norm / trace
    return NewtonSchulzTrace(trace, error, steps)


def frechet_gaps(
    x: Gaussian, y: Gaussian, scales: Sequence[Tensor | float] = (1.0, 1.0), cross: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split the Fréchet distance of ``scales[0] x`` and ``scales[1] y`` into ``(mean gap, covariance gap)``.

    They add up to it. ``cross`` is :func:`cross_trace` of the two, if known. The covariance gap is a small
    difference of large traces: what rounding leaves below zero is set to zero.
    """
    (a, b), cross = scales, cross_trace(x, y) if cross is None else cross
    cov_gap = a**2 * x.total_variance + b**2 * y.total_variance - 2 * a * b * cross
    return (a * x.mean - b * y.mean).square().sum(), cov_gap.clamp(min=0)


def trace_sqrt_product(cov_x: Tensor, cov_y: Tensor, method: TraceMethod = "auto") -> Tensor:
    r"""Trace of the square root of a product of covariances, :math:`\mathrm{Tr}((XY)^{1/2})`.

    Args:
        cov_x: covariance ``[d, d]``, symmetric and positive semi-definite, of any rank.
        cov_y: covariance ``[d, d]``.
        method: ``"exact"`` factors X in float64 and sums the roots of the eigenvalues of ``Fᵀ Y F`` (singular
            values of ``Fᵀ G`` where those would be inaccurate); ``"newton_schulz"`` iterates float32 matrix
            products to 1e-5, see :func:`newton_schulz_trace`; ``"auto"`` takes ``"exact"``, the faster one at
            every width measured so far (CPU, up to 4096).

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
    if method == "newton_schulz":
        return newton_schulz_trace(cov_x, cov_y).trace
    return cross_trace(*(Gaussian(cov[0], cov) for cov in (cov_x.double(), cov_y.double())))  # means do not matter


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
    cross = trace_sqrt_product(cov_x, cov_y, method)
    for name, mean in (("mean_x", mean_x), ("mean_y", mean_y)):
        _check_finite(name, mean)
        if mean.shape != cov_x.shape[:1]:
            raise ValueError(f"{name} must have shape [{len(cov_x)}] to go with cov_x, got {list(mean.shape)}.")
    cov_gap = cov_x.double().trace() + cov_y.double().trace() - 2 * cross
    return (mean_x.double() - mean_y.double()).square().sum() + cov_gap.clamp(min=0)


class _CrossTrace(torch.autograd.Function):
    """Nuclear norm of ``X Yᵀ`` for centred tokens X ``[n, d]``, Y ``[m, d]``.

    With ``X Yᵀ = U S Vᵀ`` the gradients are ``U Vᵀ Y`` and ``V Uᵀ X``: no inverse of a singular value occurs.
    Directions of singular value zero are left out of ``U Vᵀ``; where the norm has a kink, that is its
    subgradient of least norm. QR factors of long token sets keep the decomposition at ``d x d``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        (q_x, r_x), (q_y, r_y) = torch.linalg.qr(x), torch.linalg.qr(y)
        u, s, vh = torch.linalg.svd(r_x @ r_y.T, full_matrices=False)
        noise = max(x.shape) * torch.finfo(s.dtype).eps * torch.linalg.matrix_norm(r_x, 2)
        kept = s > noise * torch.linalg.matrix_norm(r_y, 2)
        polar = u[:, kept] @ vh[kept]
        ctx.save_for_backward(q_x @ (polar @ r_y), q_y @ (polar.T @ r_x))
        return s.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x_gradient, y_gradient = ctx.saved_tensors
        return gradient * x_gradient, gradient * y_gradient


def token_frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared Fréchet distance of the Gaussians fitted to tokens ``[n, d]`` and ``[m, d]``, n, m >= 2.

    A float64 scalar that back-propagates to the tokens, at any rank, and equals what the covariances give.
    """
    x, y = x.double(), y.double()
    centred_x, centred_y = ((t - t.mean(dim=0)) / (len(t) - 1) ** 0.5 for t in (x, y))
    cross = _CrossTrace.apply(centred_x, centred_y)
    cov_gap = centred_x.square().sum() + centred_y.square().sum() - 2 * cross
    return (x.mean(dim=0) - y.mean(dim=0)).square().sum() + cov_gap.clamp(min=0)


def _check_finite(name: str, tensor: Tensor) -> None:
    check_floating(name, tensor)
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or inf in it.")


def _check_covariances(cov_x: Tensor, cov_y: Tensor) -> None:
    if isinstance(cov_x, Tensor) and isinstance(cov_y, Tensor) and cov_x.device != cov_y.device:
        raise ValueError(f"cov_x and cov_y must be on one device, got {cov_x.device} and {cov_y.device}.")
    for name, cov in (("cov_x", cov_x), ("cov_y", cov_y)):
        _check_finite(name, cov)
        if cov.ndim != 2 or cov.shape[0] != cov.shape[1] or len(cov) == 0:
            raise ValueError(f"{name} must be a square matrix [d, d], got shape {list(cov.shape)}.")
    if cov_x.shape != cov_y.shape:
        raise ValueError(f"cov_x and cov_y must have one shape, got {list(cov_x.shape)} and {list(cov_y.shape)}.")
