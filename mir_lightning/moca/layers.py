"""The calibration of one layer, and decoder layers that end with it.

A decoder layer keeps its object, its weights' names and its hooks; only its class is swapped for a subclass, as
FSDP2 and parametrisations do. Calling it takes the mask of the forward under way and passes it on as a private
keyword, so that gradient checkpointing, which binds keywords, has the same mask when it runs the layer's
``forward`` again, in whichever thread.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from mir_lightning.moca.masks import MaskTracker

_KEYWORD = "_moca_vision_mask"


class MoCa(nn.Module):
    """Calibrates vision tokens, ``h <- u * h + v``, and leaves all others alone.

    Huang et al., 2024 (arXiv 2410.07167). The arithmetic is float32 whatever the dtype of the hidden
    states, autocast or not; the result is cast back.

    Args:
        hidden_size: width d of the hidden states.
        init_std: standard deviation of the noise on the initial ``u`` = 1 and ``v`` = 0; none when 0.
        device: of the parameters ``scale`` (u) and ``shift`` (v), ``[d]``, which are float32.
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
        width = self.scale.shape[0]
        if hidden.ndim != 3 or hidden.shape[:2] != vision_mask.shape or hidden.shape[2] != width:
            raise ValueError(
                f"MoCa of width {width} got hidden states {list(hidden.shape)} and a vision mask "
                f"{list(vision_mask.shape)}, and needs [B, S, {width}] and [B, S]: the mask is not "
                "that of this forward, or the model keeps parallel streams and is not supported."
            )
        # Promoted to float32 inside, so that autograd keeps the hidden states in their own dtype.
        calibrated = torch.addcmul(self.shift.float(), self.scale.float(), hidden).to(hidden.dtype)
        return torch.where(vision_mask.to(hidden.device).unsqueeze(-1), calibrated, hidden)

    def extra_repr(self) -> str:
        """The width."""
        return str(self.scale.shape[0])


class CalibratedLayer(nn.Module):
    """First base of a calibrated layer's class; the second, ``moca_base``, is the layer's own."""

    moca: MoCa
    moca_tracker: MaskTracker
    moca_base: type

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run hooks and ``forward`` with the mask of the forward under way."""
        kwargs[_KEYWORD] = self.moca_tracker.current()
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives, calibrated; hidden states ``[B, S, d]`` come first where it gives a tuple."""
        mask = kwargs.pop(_KEYWORD) if _KEYWORD in kwargs else self.moca_tracker.current()
        output = super().forward(*args, **kwargs)
        if mask is None:
            return output
        return (self.moca(output[0], mask), *output[1:]) if isinstance(output, tuple) else self.moca(output, mask)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _new_layer, (self.moca_base,), *reduced[2:]


@functools.cache
def calibrated_class(base: Any) -> type[CalibratedLayer]:
    """Of the same name as ``base``: wrapping policies and device maps look for layers by class name."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "moca_base": base}
    return type(base.__name__, (CalibratedLayer, base), names)


def _new_layer(base: type) -> nn.Module:
    """An empty calibrated layer, for unpickling and copying: a class made at run time has no importable name."""
    cls = calibrated_class(base)
    return cls.__new__(cls)
