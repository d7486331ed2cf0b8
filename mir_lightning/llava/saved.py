"""What runs left behind, read again: whole models, the recipe's Lightning checkpoints, small parts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from mir_lightning import moca
from mir_lightning.functional.checks import check_loaded
from mir_lightning.llava.schedule import Part, parameters_of
from mir_lightning.moca import load_moca

_VLM_PREFIX = "vlm."  # where the recipe's LightningModule keeps the model
_ADAPTER_PREFIX = "base_model.model."  # of every name in a file of peft


def load_vlm(place: str, **options: Any) -> PreTrainedModel:
    """A whole vision-language model, with MoCa if it was saved with it.

    Args:
        place: folder or hub id, or a Lightning checkpoint (``.ckpt``) of the recipe.
        options: for ``from_pretrained``; of a checkpoint, for ``from_config``.

    Raises:
        ValueError: for a checkpoint that is not the recipe's, or holds LoRA adapters.
    """
    if place.endswith(".ckpt"):
        return _from_checkpoint(Path(place), **options)
    if getattr(AutoConfig.from_pretrained(place), moca.inject.CONFIG_FLAG, False):
        return moca.from_pretrained(place, **options)
    return load_whole(AutoModelForImageTextToText, place, **options)


def load_whole(model_class: Any, place: str | Path, parts: bool = False, **options: Any) -> PreTrainedModel:
    """What ``from_pretrained`` gives, if the files hold each of the model's weights.

    Transformers draws missing weights at random, with a warning only. What a model ties or makes itself is not
    missing.

    Args:
        model_class: a Hugging Face model class.
        place: folder or hub id.
        parts: whether the files may hold more, as those of a CLIP hold a text model beside the encoder.
        options: for ``from_pretrained``.

    Raises:
        ValueError: for weights that are missing, of another shape, or unknown to the model; it names them.
    """
    model, found = model_class.from_pretrained(place, output_loading_info=True, **options)
    check_loaded(place, found, parts)
    return model


def _from_checkpoint(path: Path, **options: Any) -> PreTrainedModel:
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if "vlm_config" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of the recipe: it does not hold the model's config.")
    state = checkpoint["state_dict"]
    if any(".lora_" in name for name in state):
        raise ValueError(f"{path} holds LoRA adapters: take the folder of the same name beside it, merged.")
    model = from_config(AutoConfig.for_model(**checkpoint["vlm_config"]), **options)
    model.load_state_dict({k.removeprefix(_VLM_PREFIX): v for k, v in state.items() if k.startswith(_VLM_PREFIX)})
    return model


def from_config(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A model of that config, untrained, with MoCa if the config says so."""
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, **options)
    if getattr(config, moca.inject.CONFIG_FLAG, False):
        moca.inject_moca(model)
    return model


def processor_place(place: str) -> str:
    """Where the processor of a model lies: with it, or, of a Lightning checkpoint, in an export of the same run.

    Raises:
        ValueError: if the run of a checkpoint has not exported a model yet.
    """
    if not place.endswith(".ckpt"):
        return place
    path = Path(place).absolute()
    exports = [path.with_suffix(""), path.parent.parent / "model", *sorted(path.parent.iterdir())]
    for folder in exports:
        if has_processor(folder):
            return str(folder)
    raise ValueError(
        f"{path}: no processor in the folder of its name, in another one beside it, or in ../model; the command "
        "line takes --processor."
    )


def has_processor(folder: Path) -> bool:
    """Whether a processor was saved into the folder."""
    return any((folder / f"{name}_config.json").is_file() for name in ("processor", "preprocessor"))


def load_part(vlm: PreTrainedModel, file: Path) -> None:
    """Read a projector, MoCa or LoRA adapters, exported alone, into a model that has such a part.

    Args:
        vlm: the model.
        file: ``projector.safetensors``, ``moca.safetensors`` or ``adapter/adapter_model.safetensors``.

    Raises:
        ValueError: if the file is missing or not safetensors, or the model has no such part, or one of other names
            or shapes.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"parts: {file} cannot be read as safetensors: {error}.") from error
    if all(name.startswith("layers.") for name in tensors):
        load_moca(vlm, file)
    elif all(name.startswith(_ADAPTER_PREFIX) for name in tensors):
        _load_adapters(vlm, tensors, file)
    else:
        _load_projector(vlm, tensors, file)


def has_adapters(vlm: PreTrainedModel) -> bool:
    """Whether LoRA adapters are in the model."""
    return any(isinstance(module, LoraLayer) for module in vlm.modules())


def _load_adapters(vlm: PreTrainedModel, tensors: dict[str, Tensor], file: Path) -> None:
    if not has_adapters(vlm):
        raise ValueError(f"parts: {file} holds LoRA adapters: set model.lora, of the same rank and targets.")
    own = {name.replace(".default.", "."): p for name, p in vlm.named_parameters() if ".lora_" in name}
    given = {name.removeprefix(_ADAPTER_PREFIX): tensor for name, tensor in tensors.items()}
    _check_same(own, given, file)
    set_peft_model_state_dict(vlm, given)


def _load_projector(vlm: PreTrainedModel, tensors: dict[str, Tensor], file: Path) -> None:
    own = parameters_of(vlm, Part("projector", 1.0))
    _check_same(own, tensors, file)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def _check_same(own: dict[str, Any], given: dict[str, Tensor], file: Path) -> None:
    for name in sorted(own.keys() ^ given.keys()):
        where = "the model" if name in own else "the file"
        raise ValueError(f"parts: {file} does not fit the model: only {where} has {name}.")
    for name, parameter in own.items():
        if parameter.shape != given[name].shape:
            raise ValueError(
                f"parts: {file} does not fit the model: {name} is {list(given[name].shape)} there, and "
                f"{list(parameter.shape)} in the model."
            )
