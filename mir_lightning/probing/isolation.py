"""Look into a live model without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

_SMALL = 2**16  # values of a buffer that is looked after where it is written into, as a counter is
_PLAIN = (Tensor, bool, int, float, str, type(None), list, tuple, dict, set)
_CAPTURING = "_output_capturing_hooks_installed"  # how transformers marks a model after its first forward


@contextmanager
def leave_no_trace(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no compilation inside; afterwards everything is as before.

    Restored, also after an error: the training flag of every module (each its own), the random states of
    Python, NumPy, torch and its devices, tensors, buffers and plain values that modules replace in a forward
    (``rope_deltas`` of M-RoPE models, the frequencies of dynamic RoPE), small buffers that they write into, and
    the hooks that transformers adds in a model's first forward (with them, a model that is compiled later would be
    traced differently). ``no_grad`` and not ``inference_mode``, whose tensors a later training step may not use.
    Compiled modules run eagerly, because they ignore hooks added after compilation.
    """
    training = {module: module.training for module in model.modules()}
    kept = {module: (dict(vars(module)), dict(module._buffers)) for module in training}
    small = [b for m in training for b in m._buffers.values() if b is not None and b.numel() <= _SMALL]
    counters = [(b, b._version, b.detach().clone()) for b in small if not b.is_inference()]
    hooks = {module: list(module._forward_hooks) for module in training}
    marked = {module for module in training if _CAPTURING in vars(module)}
    error: BaseException | None = None
    with isolate_rng(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            for module in training:
                module.training = False
            yield
        except BaseException as caught:  # isolate_rng restores only when left without an error
            error = caught
        finally:
            for module, mode in training.items():
                module.training = mode
            newly_marked = [module for module in training if _CAPTURING in vars(module) and module not in marked]
            for module, (attributes, buffers) in kept.items():
                _restore(vars(module), attributes)
                _restore(module._buffers, buffers)
            for buffer, version, before in counters:
                if buffer._version != version:
                    buffer.copy_(before)
            for module in training if newly_marked else ():
                for hook in module._forward_hooks.keys() - hooks[module]:
                    del module._forward_hooks[hook]
    if error is not None:
        raise error


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Put tensors, plain values and containers back that were replaced, and take those away that came."""
    changed = [
        name for name, value in now.items() if isinstance(value, _PLAIN) and value is not before.get(name, _PLAIN)
    ]
    for name in changed:
        if name in before:
            now[name] = before[name]
        else:
            del now[name]
