"""Where the vision tokens of the forward under way are, known to every layer of that forward.

Each Hugging Face model object between the outermost one and the layers notes the mask of its call when it is
entered, and drops it when it is left. Notes are kept by thread, by injected model, and innermost last, so that
threads, other models and nested calls do not see each other's.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mir_lightning.vlm import POSITION_MASK, vision_positions


class _Call(NamedTuple):
    """A call under way of one of the model objects of ``tracker``; ``idle`` where no position is vision."""

    tracker: MaskTracker
    module: nn.Module
    mask: Tensor | None
    idle: bool


class _Thread(threading.local):
    """What this thread is in the middle of."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.explicit: list[Tensor] = []


_thread = _Thread()


@contextmanager
def vision_mask(mask: Tensor) -> Iterator[None]:
    """In the block, ``mask`` says where the vision tokens are, for every calibrated model run in this thread.

    It wins over what a model would find by itself, and drives a text LLM that is given ``inputs_embeds``. Where
    a KV cache is in use the mask covers the sequence from its first cached position on; positions beyond its
    end are text, so one mask of the prompt serves a whole ``generate``. With beams, give one row for each:
    ``mask.repeat_interleave(num_beams, 0)``.

    Args:
        mask: bool ``[B, S]``.

    Raises:
        ValueError: if it is not a boolean matrix; in the forward, if it does not fit its positions.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
        given = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be a boolean tensor [B, S], got {given}.")
    _thread.explicit.append(mask)
    try:
        yield
    finally:
        _thread.explicit.pop()


class MaskTracker:
    """Knows the mask of the forward under way, for the layers of one injected model.

    Args:
        token_ids: placeholder ids of vision tokens; empty if the model has none.
    """

    def __init__(self, token_ids: set[int]) -> None:
        self.token_ids = sorted(token_ids)
        self._handles: list[RemovableHandle] = []

    def watch(self, module: nn.Module, outermost: bool) -> None:
        """Follow the calls of one of the model objects around the layers."""
        names = list(inspect.signature(module.forward).parameters)
        enter = partial(self._enter, names, outermost)
        self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def unwatch(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def current(self) -> Tensor | None:
        """Bool ``[B, S]`` of the innermost forward, None if nothing is calibrated; a ``ValueError`` if unknown."""
        call = self._innermost()
        if call is not None and call.idle:
            return None
        mask = None if call is None else call.mask
        if mask is None and _thread.explicit:
            mask = _thread.explicit[-1]
        if mask is None:
            raise ValueError(
                "a layer with MoCa runs and no vision mask is known: call the model with input_ids, or give the "
                "mask with `with mir_lightning.moca.vision_mask(mask): ...`. (For gradient checkpointing use the "
                "model's gradient_checkpointing_enable(): wrappers around whole layers run them again in the "
                "backward pass, outside of the model.)"
            )
        return mask

    def _innermost(self) -> _Call | None:
        return next((call for call in reversed(_thread.calls) if call.tracker is self), None)

    def _enter(self, names: list[str], outermost: bool, module: nn.Module, args: Any, kwargs: Any) -> None:
        mask = self._mask({**dict(zip(names, args, strict=False)), **kwargs}, names, outermost)
        # Decoding steps have no vision token. In training the parameters stay in the graph, for DDP.
        in_use = mask is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or bool(mask.any())
        _thread.calls.append(_Call(self, module, mask, idle=not in_use))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if _thread.calls and _thread.calls[-1].module is module:
            _thread.calls.pop()

    def _mask(self, inputs: Mapping[str, Any], names: list[str], outermost: bool) -> Tensor | None:
        input_ids = inputs.get("input_ids")
        sequence = inputs.get("inputs_embeds") if input_ids is None else input_ids
        token_ids = () if input_ids is None else self.token_ids
        if sequence is not None and _thread.explicit:
            return _at_positions(_thread.explicit[-1], sequence, inputs.get("past_key_values"))
        if sequence is not None and (token_ids or POSITION_MASK in names):
            return vision_positions(sequence, inputs.get(POSITION_MASK), token_ids)
        # An inner model object that is not told goes by the call it is in; the outermost one does not know.
        call = None if outermost else self._innermost()
        return None if call is None else call.mask


def _at_positions(mask: Tensor, sequence: Tensor, cache: Any) -> Tensor:
    """The part of an explicit ``mask`` for the positions of this forward; false beyond its end."""
    rows, length = sequence.shape[:2]
    start = 0 if cache is None else int(cache.get_seq_length())
    too_short = start == 0 and mask.shape[1] < length
    too_long = cache is None and mask.shape[1] > length
    if mask.shape[0] != rows or too_short or too_long:
        raise ValueError(
            f"the vision mask {list(mask.shape)} given by vision_mask does not fit a forward of {rows} rows and "
            f"{length} positions{'' if cache is None else f' after {start} in the cache'}."
        )
    part = mask[:, start : start + length].to(sequence.device)
    return nn.functional.pad(part, (0, length - part.shape[1]))
