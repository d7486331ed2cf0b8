"""MoCa in files: with the whole model, or alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from mir_lightning.files import save_tensors
from mir_lightning.functional.checks import check_loaded
from mir_lightning.moca.inject import CONFIG_FLAG, inject_moca, moca_parameters, whole


def _names(tensors: int) -> list[str]:
    """Of the tensors in a file, in the order of :func:`moca_parameters`."""
    return [f"layers.{index // 2}.{('scale', 'shift')[index % 2]}" for index in range(tensors)]


def save_moca(model: nn.Module, file: str | Path) -> None:
    """Write u and v of every layer, float32, as safetensors: ``layers.0.scale``, ``layers.0.shift`` and on.

    Of a sharded model, call it on every rank, each with a file of its own.

    Raises:
        ValueError: if the model has no MoCa.
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
    if len(tensors) != len(parameters):
        depths = len(tensors) // 2, len(parameters) // 2
        raise ValueError(f"{file} holds MoCa of {depths[0]} layers, and the model has {depths[1]}.")
    own = dict(zip(_names(len(parameters)), parameters, strict=True))
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{file} holds MoCa of width {list(tensors[name].shape)} ({name}), and the model has "
                f"{list(parameter.shape)}."
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def from_pretrained(
    folder: str | Path, model_class: type[PreTrainedModel] | None = None, **options: Any
) -> PreTrainedModel:
    """Load a model with MoCa that was saved with its ``save_pretrained``.

    Args:
        folder: the model's folder, or name on a hub.
        model_class: its class; by default the one of transformers that the config names.
        options: for the class's ``from_pretrained``. MoCa's parameters stay float32 whatever the ``dtype``.

    Raises:
        ValueError: if it was saved without MoCa, its MoCa is not there or does not fit, or its class is not one
            of transformers.
    """
    config = AutoConfig.from_pretrained(folder)
    if not getattr(config, CONFIG_FLAG, False):
        raise ValueError(f"{folder} was saved without MoCa: load it with its own from_pretrained.")
    name = (config.architectures or [None])[0]
    base = model_class or getattr(transformers, str(name), None)
    if base is None:
        raise ValueError(f"the config names {name!r}, which is no class of transformers: give model_class.")

    def initialise(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        inject_moca(self)

    own = {"__init__": initialise, "__module__": base.__module__, "__qualname__": base.__qualname__}
    calibrated: Any = type(base.__name__, (base,), own)
    model, report = calibrated.from_pretrained(folder, output_loading_info=True, **options)
    model.__class__ = base
    missing = sorted(key for key in report["missing_keys"] if ".moca." in key)
    if missing:
        raise ValueError(f"{folder} says that it holds MoCa, but {', '.join(missing[:2])} ... are missing.")
    check_loaded(folder, report)
    return model
