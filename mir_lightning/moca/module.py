"""The calibration of one layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MoCa(nn.Module):
    """Calibrates vision tokens, ``h <- u * h + v``, and leaves all others alone.

    Huang et al., 2024 (arXiv 2410.07167). The arithmetic is float32 whatever the dtype of the hidden
    states, autocast or not; the result is cast back.

    Args:
        hidden_size: width d of the hidden states.
        init_std: standard deviation of the noise on the initial ``u`` = 1 and ``v`` = 0; none when 0.
        device: of the parameters, which are float32.

    Attributes:
        scale: u, ``[d]``.
        shift: v, ``[d]``.
    """

    def __init__(self, hidden_size: int, init_std: float = 0.0, device: torch.device | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden_size, dtype=torch.float32, device=device))
        self.shift = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32, device=device))
        if init_std:
            nn.init.normal_(self.scale, mean=1.0, std=init_std)
            nn.init.normal_(self.shift, mean=0.0, std=init_std)

    def forward(self, hidden: Tensor, vision_mask: Tensor) -> Tensor:
        """Hidden states ``[B, S, d]``, calibrated where ``vision_mask`` (bool ``[B, S]``) is true.

        Raises:
            ValueError: if the shapes do not fit each other or ``hidden_size``.
        """
        if hidden.ndim != 3 or hidden.shape[:2] != vision_mask.shape or hidden.shape[2] != self.scale.shape[0]:
            raise ValueError(
                f"MoCa of width {self.scale.shape[0]} got hidden states {list(hidden.shape)} and a vision mask "
                f"{list(vision_mask.shape)}, and needs [B, S, {self.scale.shape[0]}] and [B, S]: the mask is not "
                "that of this forward, or the model keeps parallel streams and is not supported."
            )
        # Promoted to float32 inside, so that autograd keeps the hidden states in their own dtype.
        calibrated = torch.addcmul(self.shift.float(), self.scale.float(), hidden).to(hidden.dtype)
        return torch.where(vision_mask.to(hidden.device).unsqueeze(-1), calibrated, hidden)

    def extra_repr(self) -> str:
        """The width."""
        return str(self.scale.shape[0])
