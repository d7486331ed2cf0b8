"""Float32 matrix products that are float32, whatever the user has switched on for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


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
