"""Checkpoints that other tools read: the whole model in Hugging Face format, and its small parts alone."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import PreTrainedModel

from mir_lightning.llava.restart import BetweenSteps
from mir_lightning.llava.saved import has_adapters
from mir_lightning.llava.schedule import Part, parameters_of
from mir_lightning.llava.sharding import gathered
from mir_lightning.moca import save_moca
from mir_lightning.moca.inject import CONFIG_FLAG


def export(vlm: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Write a folder that ``AutoModelForImageTextToText`` and ``AutoProcessor`` load.

    LoRA adapters are merged into the model, and lie in ``adapter/`` as well, for peft. The projector lies in
    ``projector.safetensors``, under the names it has in the model, MoCa in ``moca.safetensors``; a whole model
    with MoCa is loaded by :func:`mir_lightning.moca.from_pretrained`.
    """
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    _merged(vlm).save_pretrained(beside)
    processor.save_pretrained(beside)
    projector = {name: p.detach().cpu() for name, p in parameters_of(vlm, Part("projector", 1.0)).items()}
    save_file(projector, beside / "projector.safetensors")
    if getattr(vlm.config, CONFIG_FLAG, False):
        save_moca(vlm, beside / "moca.safetensors")
    if has_adapters(vlm):
        _save_adapter(vlm, beside / "adapter", folder)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def _merged(vlm: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapters in its weights; a copy if it has any."""
    if not has_adapters(vlm):
        return vlm
    merged = copy.deepcopy(vlm)
    for name, module in list(merged.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            owner, _, last = name.rpartition(".")
            setattr(merged.get_submodule(owner), last, module.get_base_layer())
    del merged.peft_config
    merged._hf_peft_config_loaded = False
    return merged


def _save_adapter(vlm: PreTrainedModel, folder: Path, base: Path) -> None:
    """As peft writes it. The base is the merged model without them: a run's start, named for information."""
    folder.mkdir()
    state = get_peft_model_state_dict(vlm)
    save_file(
        {f"base_model.model.{key}": value.contiguous() for key, value in state.items()},
        folder / "adapter_model.safetensors",
    )
    vlm.peft_config["default"].save_pretrained(folder)


class ExportingCheckpoint(BetweenSteps):
    """Lightning's checkpoints; each kept one has a folder in Hugging Face format beside it, of the same name."""

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        module: Any = trainer.lightning_module
        vlm = gathered(module.vlm)
        if vlm is not None and trainer.is_global_zero:
            export(vlm, module.processor, Path(filepath).with_suffix(""))

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            shutil.rmtree(Path(filepath).with_suffix(""), ignore_errors=True)
