"""Put MoCa into a model and take it out; write it to files and read it again."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, PreTrainedModel

from mir_lightning.files import save_tensors
from mir_lightning.functional.checks import check_loaded
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
    layers: Any = find_decoder(found).layers  # whose class is swapped
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
        layer.__class__ = calibrated_class(layer.__class__)
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
    """All u and v, for an optimizer group of their own, without weight decay; a ``ValueError`` without MoCa.

    Under PEFT's ``modules_to_save`` these are those of the active adapter.
    """
    return [value for layer in calibrated_layers(model) for value in (layer.moca.scale, layer.moca.shift)]


def moca_statistics(model: nn.Module) -> dict[str, float]:
    """How far each layer's calibration is from none.

    ``moca/scale/layer_01`` and on: mean of abs(u - 1); ``moca/shift/layer_01`` and on: mean of abs(v). Of a
    sharded model, call it on every rank. A ``ValueError`` without MoCa.
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


def _names(tensors: int) -> list[str]:
    """Of so many tensors in a file, in the order of :func:`moca_parameters`."""
    return [f"layers.{index // 2}.{('scale', 'shift')[index % 2]}" for index in range(tensors)]


def save_moca(model: nn.Module, file: str | Path) -> None:
    """Write u and v of every layer, float32, as safetensors: ``layers.0.scale``, ``layers.0.shift`` and on.

    Of a sharded model, call it on every rank, each with a file of its own. A ``ValueError`` without MoCa.
    """
    tensors = [whole(parameter).cpu().contiguous() for parameter in moca_parameters(model)]
    save_tensors(dict(zip(_names(len(tensors)), tensors, strict=True)), file)


def load_moca(model: nn.Module, file: str | Path) -> None:
    """Read u and v written by :func:`save_moca` into a model that MoCa was injected into.

    Raises:
        ValueError: if the model has no MoCa or is sharded, the file is missing or holds something else, or the
            number of layers or their width is not the model's; the model is then as it was.
    """
    parameters = moca_parameters(model)
    if not Path(file).is_file():
        raise ValueError(f"file: there is no {file}; save_moca writes one.")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}.") from error
    if not tensors or set(tensors) != set(_names(len(tensors))):
        raise ValueError(f"{file} was not written by save_moca: it holds {', '.join(sorted(tensors)[:3])} ...")
    found, depth = len(tensors) // 2, len(parameters) // 2
    if found != depth:
        raise ValueError(f"{file} holds MoCa of {found} layers, and the model has {depth}.")
    own = dict(zip(_names(len(parameters)), parameters, strict=True))
    for name, parameter in own.items():
        widths = list(tensors[name].shape), list(parameter.shape)
        if widths[0] != widths[1]:
            raise ValueError(f"{file} holds MoCa of width {widths[0]} ({name}), and the model has {widths[1]}.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def from_pretrained(
    folder: str | Path, model_class: type[PreTrainedModel] | None = None, **options: Any
) -> PreTrainedModel:
    """Load a model with MoCa that was saved with its ``save_pretrained``.

    Args:
        folder: the model's folder, or name on a hub.
        model_class: its class; by default the one that the config names, of transformers or registered with it.
        options: for the class's ``from_pretrained``. MoCa's parameters stay float32 whatever the ``dtype``.

    Raises:
        ValueError: if it was saved without MoCa, its MoCa is not there or does not fit, or its class is not one
            of transformers.
    """
    config = AutoConfig.from_pretrained(folder)
    if not getattr(config, CONFIG_FLAG, False):
        raise ValueError(f"{folder} was saved without MoCa: load it with its own from_pretrained.")
    name = (config.architectures or [None])[0]
    own: Any = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    registered = own if getattr(own, "__name__", None) == name else None
    base = model_class or getattr(transformers, str(name), registered)
    if base is None:
        raise ValueError(f"the config names {name!r}, which is no class of transformers: give model_class.")

    def initialise(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        inject_moca(self)

    patched = {"__init__": initialise, "__module__": base.__module__, "__qualname__": base.__qualname__}
    calibrated: Any = type(base.__name__, (base,), patched)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
    model, report = calibrated.from_pretrained(folder, **options)
    model.__class__ = base
    missing = sorted(key for key in report["missing_keys"] if ".moca." in key)
    if missing:
        raise ValueError(f"{folder} says that it holds MoCa, but {', '.join(missing[:2])} ... are missing.")
    check_loaded(folder, report)
    return model
