"""Which precision this machine computes well in."""

import os
import timeit
from functools import lru_cache

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.functional import linear

_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))  # compute capabilities of P100, V100, A100, H100, B200
_NATIVE = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # names of torch.cpu.get_capabilities, x86 and ARM


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AVX512-BF16, AMX, ARM BF16), and torch may use it.

    Without, PyTorch emulates them many times slower than float32. A limit in the environment variables
    ``ONEDNN_MAX_CPU_ISA`` or ``ATEN_CPU_CAPABILITY`` below AVX512-BF16 counts as not having it.
    """
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    limited = isa not in ("ALL", "DEFAULT") and "BF16" not in isa and "AMX" not in isa and "FP16" not in isa
    limited |= os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2")
    if limited or not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.12 does not tell
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _NATIVE)


def best_precision(accelerator: str) -> tuple[str, str]:
    """Precision to train in, ``"bf16-mixed"`` where bfloat16 is native, else ``"32-true"``, and why."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        name, native = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator in ("auto", "cpu"):
        name, native = "this CPU", cpu_has_bfloat16()
    else:
        return "32-true", f"nothing is known of bfloat16 on accelerator {accelerator}"
    if native:
        return "bf16-mixed", f"{name} computes bfloat16 natively"
    return "32-true", f"{name} does not compute bfloat16 natively"


def float64_is_slow(device: torch.device) -> bool:
    """Whether a device takes some 30 or 60 times longer for float64 than for float32: most of NVIDIA's do."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) not in _FLOAT64


def cpu_dtype(saved: torch.dtype) -> torch.dtype:
    """What to load weights of dtype ``saved`` in on the CPU: float32 instead of a precision that it emulates."""
    if saved == torch.float16 or (saved == torch.bfloat16 and not cpu_has_bfloat16()):
        return torch.float32
    return saved


@lru_cache(maxsize=1)
def bfloat16_slowdown() -> float:
    """How many times longer the CPU takes for products of bfloat16 than of float32; some tenths of a second."""

    def seconds(dtype: torch.dtype) -> float:
        tokens, width, wide = 512, 576, 1536  # through a layer of a small model
        shapes = ((wide, width), (tokens, width), (tokens, wide))
        layer, hidden, gradient = (torch.ones(shape, dtype=dtype) for shape in shapes)
        return min(timeit.repeat(lambda: (linear(hidden, layer), gradient @ layer), number=1, repeat=3))

    return seconds(torch.bfloat16) / seconds(torch.float32)


def warn_of_slow_bfloat16(option: str, instead: str) -> None:
    """One warning, where the CPU emulates bfloat16, of what that costs, and what to ask for ``instead``."""
    if not cpu_has_bfloat16():
        rank_zero_warn(
            f"{option}: this CPU does not compute bfloat16 natively; products take "
            f"{bfloat16_slowdown():.1f} times as long as in float32 here. {instead} is faster."
        )
