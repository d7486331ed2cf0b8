"""Look into a live model without leaving a trace."""

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
    kept = {m: (dict(vars(m)), dict(m._buffers), list(m._forward_hooks)) for m in model.modules()}
    small = [b for m in kept for b in m._buffers.values() if b is not None and b.numel() <= _SMALL]
    counters = [(b, b._version, b.detach().clone()) for b in small if not b.is_inference()]
    error: BaseException | None = None
    with isolate_rng(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            for module in kept:
                module.training = False
            yield
        except BaseException as caught:  # isolate_rng restores only when left without an error
            error = caught
        finally:
            hooked = any(_CAPTURING in vars(m) and _CAPTURING not in before for m, (before, _, _) in kept.items())
            for module, (attributes, buffers, hooks) in kept.items():
                _restore(vars(module), attributes)  # training flags, too
                _restore(module._buffers, buffers)
                for hook in module._forward_hooks.keys() - hooks if hooked else ():
                    del module._forward_hooks[hook]
            for buffer, version, before in counters:
                if buffer._version != version:
                    buffer.copy_(before)
    if error is not None:
        raise error


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Put tensors, plain values and containers back that were replaced, and take those away that came."""
    for name, value in list(now.items()):
        if isinstance(value, _PLAIN) and value is not before.get(name, _PLAIN):
            if name in before:
                now[name] = before[name]
            else:
                del now[name]
