"""MoCa in files: with the whole model, or alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from mir_lightning.functional.checks import check_loaded
from mir_lightning.moca.inject import CONFIG_FLAG, calibrated_layers, inject_moca, whole

_PARTS = ("scale", "shift")


def save_moca(model: nn.Module, file: str | Path) -> None:
    """Write u and v of every layer, float32, as safetensors: ``layers.0.scale``, ``layers.0.shift`` and on.

    Of a sharded model, call it on every rank, each with a file of its own.

    Raises:
        ValueError: if the model has no MoCa.
    """
    tensors = {
        f"layers.{index}.{part}": whole(getattr(layer.moca, part)).cpu().contiguous()
        for index, layer in enumerate(calibrated_layers(model))
        for part in _PARTS
    }
    save_file(tensors, file)


def load_moca(model: nn.Module, file: str | Path) -> None:
    """Read u and v written by :func:`save_moca` into a model that MoCa was injected into.

    Raises:
        ValueError: if the model has no MoCa or is sharded, the file is missing or holds something else, or the
            number of layers or their width is not the model's; the model is then as it was.
    """
    layers = calibrated_layers(model)
    tensors = _read(Path(file))
    depth = len(tensors) // len(_PARTS)
    if depth != len(layers):
        raise ValueError(f"{file} holds MoCa of {depth} layers, and the model has {len(layers)}.")
    targets = {
        f"layers.{index}.{part}": getattr(layer.moca, part)
        for index, layer in enumerate(layers)
        for part in _PARTS
    }
    for name, target in targets.items():
        if tensors[name].shape != target.shape:
            raise ValueError(
                f"{file} holds MoCa of width {list(tensors[name].shape)} ({name}), and the model has "
                f"{list(target.shape)}."
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def _read(file: Path) -> Mapping[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"file: there is no {file}; save_moca writes one.")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}.") from error
    expected = {f"layers.{index}.{part}" for index in range(len(tensors) // 2) for part in _PARTS}
    if not tensors or set(tensors) != expected:
        raise ValueError(f"{file} was not written by save_moca: it holds {', '.join(sorted(tensors)[:3])} ...")
    return tensors


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
    model_class = model_class or _named_class(config)

    def initialise(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        inject_moca(self)

    own = {
        "__init__": initialise,
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
    }
    calibrated: Any = type(model_class.__name__, (model_class,), own)
    model, report = calibrated.from_pretrained(folder, output_loading_info=True, **options)
    model.__class__ = model_class
    missing = sorted(key for key in report["missing_keys"] if ".moca." in key)
    if missing:
        raise ValueError(f"{folder} says that it holds MoCa, but {', '.join(missing[:2])} ... are missing.")
    check_loaded(folder, report)
    return model


def _named_class(config: Any) -> type[PreTrainedModel]:
    name = (config.architectures or [None])[0]
    found = getattr(transformers, name, None) if name else None
    if found is None:
        raise ValueError(f"the config names {name!r}, which is no class of transformers: give model_class.")
    return found
