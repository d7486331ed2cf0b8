"""Fréchet distance of two sets of tokens with a stable gradient, for MIR as an auxiliary loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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

    Back-propagates to the tokens, at any rank. Equal to what the covariances give (``n - 1`` denominators).

    Returns:
        A float64 scalar.
    """
    x, y = x.double(), y.double()
    centred_x, centred_y = ((t - t.mean(dim=0)) / (len(t) - 1) ** 0.5 for t in (x, y))
    cross = _CrossTrace.apply(centred_x, centred_y)
    cov_gap = centred_x.square().sum() + centred_y.square().sum() - 2 * cross
    return (x.mean(dim=0) - y.mean(dim=0)).square().sum() + cov_gap.clamp(min=0)
