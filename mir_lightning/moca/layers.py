"""Decoder layers that calibrate what they give.

A layer keeps its object, its weights' names and its hooks; only its class is swapped for a subclass, as FSDP2
and parametrisations do. Calling it takes the mask of the forward under way and passes it on as a private keyword,
so that gradient checkpointing, which binds keywords, has the same mask when it runs the layer's ``forward`` again,
in whichever thread.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from mir_lightning.moca.masks import MaskTracker
from mir_lightning.moca.module import MoCa

_KEYWORD = "_moca_vision_mask"


class CalibratedLayer(nn.Module):
    """First base of a calibrated layer's class; the second is the layer's own."""

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
        if isinstance(output, tuple):
            return (self.moca(output[0], mask), *output[1:])
        return self.moca(output, mask)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _new_layer, (self.moca_base,), *reduced[2:]


def calibrate(layer: nn.Module, moca: MoCa, tracker: MaskTracker) -> None:
    """Make ``layer`` end with ``moca``."""
    layer.__class__ = _calibrated_class(type(layer))  # type: ignore[arg-type]
    assert isinstance(layer, CalibratedLayer)
    layer.moca = moca
    layer.moca_tracker = tracker


def restore(layer: CalibratedLayer) -> None:
    """Undo :func:`calibrate`."""
    del layer.moca
    del layer.moca_tracker
    layer.__class__ = layer.moca_base


@functools.cache
def _calibrated_class(base: type) -> type[CalibratedLayer]:
    """Of the same name as ``base``: wrapping policies and device maps look for layers by class name."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "moca_base": base}
    return type(base.__name__, (CalibratedLayer, base), names)


def _new_layer(base: type) -> nn.Module:
    """An empty calibrated layer, for unpickling and copying: a class made at run time has no importable name."""
    cls = _calibrated_class(base)
    return cls.__new__(cls)
