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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_POSITION_MASK = "image_embeds_position_mask"  # how kosmos-2 and kosmos-2.5 are told


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
        entrance = _Entrance(self, module, outermost)
        self._handles += [
            module.register_forward_pre_hook(entrance.enter, with_kwargs=True),
            module.register_forward_hook(entrance.leave, always_call=True),
        ]

    def unwatch(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def current(self) -> Tensor | None:
        """The mask, bool ``[B, S]``, of the innermost forward under way; None if it has nothing to calibrate.

        Raises:
            ValueError: if no mask is known.
        """
        call = self.innermost()
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

    def innermost(self) -> _Call | None:
        """The innermost call under way."""
        for call in reversed(_thread.calls):
            if call.tracker is self:
                return call
        return None


class _Entrance:
    """The hooks on one model object."""

    def __init__(self, tracker: MaskTracker, module: nn.Module, outermost: bool) -> None:
        self._tracker = tracker
        self._outermost = outermost
        self._names = tuple(inspect.signature(module.forward).parameters)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        mask = self._mask(inputs)
        # Decoding steps have no vision token. In training the parameters stay in the graph, for DDP.
        in_use = mask is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or bool(mask.any())
        _thread.calls.append(_Call(self._tracker, module, mask, idle=not in_use))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _thread.calls and _thread.calls[-1].module is module:
            _thread.calls.pop()

    def _mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        input_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        sequence = embeds if input_ids is None else input_ids
        if sequence is None:
            return self._inherited()
        if _thread.explicit:
            return _at_positions(_thread.explicit[-1], sequence, inputs.get("past_key_values"))
        if _POSITION_MASK in self._names:
            given = inputs.get(_POSITION_MASK)
            return sequence.new_zeros(sequence.shape[:2], dtype=torch.bool) if given is None else given.bool()
        if input_ids is None or not self._tracker.token_ids:
            return self._inherited()
        first, *more = self._tracker.token_ids
        mask = input_ids == first
        for token_id in more:
            mask = mask | (input_ids == token_id)
        return mask

    def _inherited(self) -> Tensor | None:
        """An inner model object that is not told goes by the call it is in; the outermost one does not know."""
        call = None if self._outermost else self._tracker.innermost()
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
