"""Put MoCa into a model, and take it out."""

from __future__ import annotations

import math
from contextlib import suppress

from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from mir_lightning.moca.layers import CalibratedLayer, MoCa, calibrated_class
from mir_lightning.moca.masks import MaskTracker
from mir_lightning.vlm import find_decoder, find_vlm, vision_token_ids

CONFIG_FLAG = "moca"


def inject_moca(model: nn.Module, init_std: float = 0.0) -> None:
    """Calibrate the vision tokens after every decoder layer: ``h <- u * h + v`` with learnable u and v.

    In place. Each decoder layer gets a :class:`~mir_lightning.moca.MoCa` as its submodule ``moca``, float32 and
    trainable, and what the layer gives is calibrated. Vision tokens are found in each call's own ``input_ids``,
    or said by :func:`~mir_lightning.moca.vision_mask`; a calibrated layer that runs while neither is known raises
    a ``ValueError``. With ``init_std=0`` the model's outputs stay the same bit for bit until u and v are trained.

    Inject before ``get_peft_model``, ``fully_shard``, ``DistributedDataParallel`` and ``torch.compile``, and
    before the optimizer is made.

    Args:
        model: a Hugging Face vision-language model, a text LLM, or a module that holds one of them.
        init_std: standard deviation of the noise on the initial u = 1 and v = 0.

    Raises:
        ValueError: if there is no such model or it is of a kind that MIR does not support either; if it is
            calibrated, wrapped or sharded already; or for a negative ``init_std``.
    """
    if not 0 <= init_std < math.inf:
        raise ValueError(f"init_std must be 0 or above, got {init_std}.")
    if isinstance(model, (PeftModel, DistributedDataParallel)):
        raise ValueError(
            f"model is wrapped in {type(model).__name__}, which would not train or save MoCa: inject it before."
        )
    found = find_vlm(model)
    layers = find_decoder(found).layers
    for layer in layers:
        if isinstance(layer, CalibratedLayer):
            raise ValueError(f"{type(found).__name__} has MoCa already: remove_moca(model) first.")
        if isinstance(layer, FSDPModule) or "forward" in vars(layer):
            raise ValueError(
                f"a decoder layer of {type(found).__name__} is sharded, compiled or dispatched to a device "
                f"already ({type(layer).__name__}): inject MoCa before."
            )
    token_ids: set[int] = set()
    with suppress(ValueError):  # the config names no image token: the mask comes with the call
        token_ids = vision_token_ids(found.config)
    tracker = MaskTracker(token_ids)
    width = found.config.get_text_config(decoder=True).hidden_size
    for layer in layers:
        moca = MoCa(width, init_std, next(layer.parameters()).device)
        layer.__class__ = calibrated_class(type(layer))
        layer.moca, layer.moca_tracker = moca, tracker
    for part in found.modules():
        if isinstance(part, PreTrainedModel) and any(module is layers for module in part.modules()):
            tracker.watch(part, outermost=part is found)
    setattr(found.config, CONFIG_FLAG, True)


def remove_moca(model: nn.Module) -> None:
    """Take MoCa out, without a trace: the model computes and saves what it did before it was injected.

    Raises:
        ValueError: if there is none, or PEFT or FSDP2 has wrapped it since.
    """
    found = find_vlm(model)
    layers = calibrated_layers(model)
    for layer in layers:
        if not isinstance(layer.moca, MoCa) or type(layer).__dict__.get("moca_base") is None:
            raise ValueError(
                f"{type(found).__name__} was wrapped after MoCa was injected: merge or unload the PEFT adapter "
                "first; out of a sharded model it cannot be taken."
            )
    layers[0].moca_tracker.unwatch()
    for layer in layers:
        del layer.moca, layer.moca_tracker
        layer.__class__ = layer.moca_base
    delattr(found.config, CONFIG_FLAG)


def calibrated_layers(model: nn.Module) -> list[CalibratedLayer]:
    """The decoder layers, each with its ``moca``; a ``ValueError`` if there are none."""
    found = find_vlm(model)
    layers = [layer for layer in find_decoder(found).layers.modules() if isinstance(layer, CalibratedLayer)]
    if not layers:
        raise ValueError(f"{type(found).__name__} has no MoCa: call inject_moca(model) first.")
    return layers


def moca_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All u and v, for an optimizer group of their own, without weight decay.

    Under PEFT's ``modules_to_save`` these are those of the active adapter.

    Raises:
        ValueError: if the model has no MoCa.
    """
    return [value for layer in calibrated_layers(model) for value in (layer.moca.scale, layer.moca.shift)]


def moca_statistics(model: nn.Module) -> dict[str, float]:
    """How far each layer's calibration is from none.

    ``moca/scale/layer_01`` and on: mean of abs(u - 1); ``moca/shift/layer_01`` and on: mean of abs(v). Of a
    sharded model, call it on every rank.

    Raises:
        ValueError: if the model has no MoCa.
    """
    values = {}
    for number, layer in enumerate(calibrated_layers(model), start=1):
        values[f"moca/scale/layer_{number:02d}"] = (whole(layer.moca.scale) - 1).abs().mean().item()
        values[f"moca/shift/layer_{number:02d}"] = whole(layer.moca.shift).abs().mean().item()
    return values


def whole(parameter: Tensor) -> Tensor:
    """The value of a parameter, gathered if it is sharded; detached, float32."""
    value = parameter.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).float()
