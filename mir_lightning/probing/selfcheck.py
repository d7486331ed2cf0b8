"""Whether the vision mask is right: change the pixels, and see which inputs of the first layer move."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mir_lightning.vlm import TokenMasks

_NOT_PIXELS = ("mask", "embeds")


def check_vision_mask(
    first_layer: nn.Module, forward: Callable[[dict[str, Any]], Any], inputs: dict[str, Any], masks: TokenMasks
) -> bool:
    """Run a batch twice, with other pixels the second time.

    Args:
        first_layer: the first decoder layer.
        forward: runs inputs through the whole model.
        inputs: of the batch; every floating-point tensor but masks and embeddings is taken for pixels.
        masks: of the batch.

    Returns:
        Whether some position moved; none does while a projector is silent (its output layer all zeros).

    Raises:
        ValueError: if a position outside the vision mask moved, or there are no pixels to change.
    """
    changed = _with_other_pixels(inputs)
    before, after = (_first_layer_input(first_layer, forward, given) for given in (inputs, changed))
    if before.shape[:2] != masks.vision.shape:
        return True  # the layers say with a better message that the sequence has another length
    moved = (before != after).any(dim=-1).cpu()
    outside = moved & ~masks.vision
    if outside.any():
        sample, position = outside.nonzero()[0].tolist()
        raise ValueError(
            f"the vision mask is wrong: {int(outside.sum())} positions outside it carry pixels (sample {sample}, "
            f"position {position}, token {int(inputs['input_ids'][sample, position])} for one). Give "
            'image_token_id, or each probe batch a "vision_mask".'
        )
    return bool(moved.any())


def _with_other_pixels(inputs: dict[str, Any]) -> dict[str, Any]:
    """Noise added to the pixels; zeros stay, since whole images of them are padding to some models."""
    generator = torch.Generator().manual_seed(0)
    changed = {}
    for key, value in inputs.items():
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and not any(part in key for part in _NOT_PIXELS)
        ):
            noise = torch.randn(value.shape, generator=generator).to(value)
            changed[key] = torch.where(value == 0, value, value + noise)
    if not changed:
        raise ValueError(
            f"the probe's batches carry no pixels (floating-point tensors) to check the vision mask with: their "
            f"keys are {sorted(inputs)}. Pass check=False to go without."
        )
    return {**inputs, **changed}


def _first_layer_input(
    layer: nn.Module, forward: Callable[[dict[str, Any]], Any], inputs: dict[str, Any]
) -> Tensor:
    seen: list[Tensor] = []
    name = next(iter(inspect.signature(layer.forward).parameters))
    handle = layer.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append((args[0] if args else kwargs[name]).detach()), with_kwargs=True
    )
    try:
        forward(inputs)
    finally:
        handle.remove()
    return seen[0]
