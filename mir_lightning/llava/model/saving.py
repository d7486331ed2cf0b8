"""Models in files: whole ones in Hugging Face format, the recipe's Lightning checkpoints, small parts alone."""

import copy
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from peft import set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
from transformers.utils import VIDEO_PROCESSOR_NAME, cached_file

from mir_lightning import moca
from mir_lightning.files import read_json, regular_file, save_tensors
from mir_lightning.functional.checks import check_loaded
from mir_lightning.llava.model import connector  # noqa: F401  registers the LLaVA of other connectors
from mir_lightning.llava.trainer import BetweenSteps, DivergedError
from mir_lightning.moca.inject import CONFIG_FLAG
from mir_lightning.vlm import parameters_of

_VLM_PREFIX = "vlm."  # where the recipe's LightningModule keeps the model
_ADAPTER_PREFIX = "base_model.model."  # of every name in a file of peft


@contextmanager
def naming(place: str | Path) -> Iterator[None]:
    """Errors of libraries that do not say what they read become a ``ValueError`` that does.

    Pipes are refused before: those who load a folder would wait forever for what is written into one.
    """
    for path in (Path(place), *Path(place).glob("*")):
        if path.exists() and not path.is_dir():
            regular_file(path)
    try:
        yield
    except Exception as error:
        said = str(error)
        tells = said.startswith(str(place)) or (isinstance(error, OSError) and str(place) in said)
        if isinstance(error, ImportError) or tells:
            raise
        raise ValueError(f"{place} cannot be loaded: {said} ({type(error).__name__}).") from error


def load_vlm(place: str, **options: Any) -> PreTrainedModel:
    """A whole vision-language model of a folder, a hub id, or a ``.ckpt`` of the recipe; with MoCa if it had it.

    What is damaged, and a checkpoint that is not the recipe's or holds LoRA adapters, raise a ``ValueError``.
    """
    with naming(place):
        if not place.lower().endswith(".ckpt"):
            if getattr(AutoConfig.from_pretrained(place), CONFIG_FLAG, False):
                return moca.from_pretrained(place, **options)
            return load_whole(AutoModelForImageTextToText, place, **options)
        checkpoint = torch.load(place, map_location="cpu", weights_only=True)
        if "vlm_config" not in checkpoint:
            raise ValueError(f"{place} is no checkpoint of the recipe: it does not hold the model's config.")
        state = checkpoint["state_dict"]
        if any(".lora_" in name for name in state):
            raise ValueError(f"{place} holds LoRA adapters: take the folder of the same name beside it, merged.")
        model = _from_config(AutoConfig.for_model(**checkpoint["vlm_config"]), **options)
        own = {name.removeprefix(_VLM_PREFIX): t for name, t in state.items() if name.startswith(_VLM_PREFIX)}
        model.load_state_dict(own)
        return model


def load_whole(model_class: Any, place: str | Path, parts: bool = False, **options: Any) -> PreTrainedModel:
    """What ``from_pretrained`` gives, or a ``ValueError`` that names what the files lack or have too much.

    Transformers draws missing weights at random, with a warning only. What a model ties or makes itself is not
    missing. ``parts``: the files may hold more, as those of a CLIP hold a text model beside the encoder.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
    with naming(place):
        model, found = model_class.from_pretrained(place, **options)
        check_loaded(place, found, parts)
    return model


def _from_config(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A model of that config, untrained, with MoCa if the config says so."""
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, **options)
    if getattr(config, CONFIG_FLAG, False):
        moca.inject_moca(model)
    return model


def load_processor(place: str) -> Any:
    """The processor that lies with a model or, of a ``.ckpt``, in an export of its run.

    Where its video part cannot be built, for want of torchvision, it serves images without it.
    """
    with naming(place), naming(found := _processor_place(place)):
        try:
            return AutoProcessor.from_pretrained(found)
        except ImportError as error:
            name = PROCESSOR_MAPPING_NAMES.get(AutoConfig.from_pretrained(found).model_type)
            kind = processor_class_from_name(name) if isinstance(name, str) else None
            try:
                if kind is None or "video_processor" not in kind.get_attributes():
                    raise error
                processor = _images_only(kind).from_pretrained(found)
            except ImportError as second:
                needs = f"the processor at {found} needs torchvision: pip install torchvision ({second})"
                raise ImportError(needs) from second
            # What makes it is saved along, for who has torchvision: its own options, or else those of images.
            alone = cached_file(found, VIDEO_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False)
            given = kind.get_processor_dict(found)[0].get("video_processor") or (alone and read_json(alone))
            processor.video_processor = given or processor.image_processor.to_dict()
            return processor


def _images_only(kind: Any) -> Any:
    """An empty processor of that class, without a video part; pickle makes it by this too."""
    parts = [part for part in kind.get_attributes() if part != "video_processor"]
    own: dict[str, Any] = {"get_attributes": classmethod(lambda cls: parts)}
    own["__reduce__"] = lambda self: (_images_only, (kind,), vars(self))
    made: Any = type(kind.__name__, (kind,), own)
    return made.__new__(made)


def _processor_place(place: str) -> str:
    path = Path(place).absolute()
    if path.suffix.lower() != ".ckpt":
        return place
    for folder in (path.with_suffix(""), path.parent.parent / "model", *sorted(path.parent.glob("*"))):
        if has_processor(folder):
            return str(folder)
    where = "the folder of its name, in another one beside it, or in ../model"
    raise ValueError(f"{place}: no processor in {where}; the command line takes --processor.")


def has_processor(folder: Path) -> bool:
    """Whether a processor was saved into the folder."""
    return any((folder / f"{name}_config.json").is_file() for name in ("processor", "preprocessor"))


def load_part(vlm: PreTrainedModel, file: Path) -> None:
    """Read a projector, MoCa or LoRA adapters, files of an export, into a model that has such a part.

    Another part, names or shapes than the model's, or what is not safetensors, raise a ``ValueError``.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"parts: {file} cannot be read as safetensors: {error}.") from error
    if all(name.startswith("layers.") for name in tensors):
        moca.load_moca(vlm, file)
    elif all(name.startswith(_ADAPTER_PREFIX) for name in tensors):
        adapters = parameters_of(vlm, "lora", required=False)
        if not adapters:
            raise ValueError(f"parts: {file} holds LoRA adapters: set model.lora, of the same rank and targets.")
        given = {name.removeprefix(_ADAPTER_PREFIX): tensor for name, tensor in tensors.items()}
        _check_same({name.replace(".default.", "."): p for name, p in adapters.items()}, given, file)
        set_peft_model_state_dict(vlm, given)
    else:
        _check_same(parameters_of(vlm, "projector"), tensors, file)
        vlm.load_state_dict(tensors, strict=False)


def _check_same(own: dict[str, nn.Parameter], given: dict[str, Tensor], file: Path) -> None:
    for name in sorted(own.keys() ^ given.keys()):
        where = "the model" if name in own else "the file"
        raise ValueError(f"parts: {file} does not fit the model: only {where} has {name}.")
    for name, parameter in own.items():
        there, here = list(given[name].shape), list(parameter.shape)
        if there != here:
            raise ValueError(f"parts: {file} does not fit: {name} is {there} there, and {here} in the model.")


def gathered(vlm: PreTrainedModel) -> PreTrainedModel | None:
    """The whole model, on the CPU, of a sharded one: call it on every rank; ``None`` on all but the first.

    A model that is not sharded is returned as it is.
    """
    if not isinstance(vlm, FSDPModule):
        return vlm
    state = get_model_state_dict(vlm, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:
        return None
    with torch.device("meta"):
        whole = _from_config(vlm.config)
        for config in getattr(vlm, "peft_config", {}).values():
            whole.add_adapter(config)
    nn.Module.load_state_dict(whole, state, assign=True)
    whole.tie_weights()
    return whole


def export(vlm: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Write a folder that ``AutoModelForImageTextToText`` and ``AutoProcessor`` load.

    LoRA adapters are merged into the model, and lie in ``adapter/`` as well, for peft. The projector lies in
    ``projector.safetensors``, under the names it has in the model, MoCa in ``moca.safetensors``; a whole model
    with MoCa is loaded by :func:`mir_lightning.moca.from_pretrained`.
    """
    beside = _beside(folder)
    shutil.rmtree(beside, ignore_errors=True)
    whole = vlm
    if parameters_of(vlm, "lora", required=False):
        vlm.save_pretrained(beside / "adapter")  # of a model with adapters, them alone, as peft does
        whole = copy.deepcopy(vlm)
        for name, module in list(whole.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge()
                whole.set_submodule(name, module.get_base_layer())
        del whole.peft_config
        whole._hf_peft_config_loaded = False
    whole.save_pretrained(beside)
    processor.save_pretrained(beside)
    projector = {name: p.detach().cpu() for name, p in parameters_of(vlm, "projector").items()}
    save_tensors(projector, beside / "projector.safetensors")
    if getattr(vlm.config, CONFIG_FLAG, False):
        moca.save_moca(vlm, beside / "moca.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")


def export_trained(trainer: pl.Trainer, folder: Path, last: bool = False) -> None:
    """Export the model in training; every rank has to call it, the first one writes.

    What cannot be written is warned of, and the folder stays as it was; but the ``last`` export raises, also where
    the model has diverged.
    """
    module: Any = trainer.lightning_module
    vlm = gathered(module.vlm)
    if vlm is None or not trainer.is_global_zero:
        return
    if last and (bad := [name for name, p in vlm.named_parameters() if not p.isfinite().all()]):
        raise DivergedError(f"the model has diverged and is not exported: its weight {bad[0]} is not finite.")
    try:
        export(vlm, module.processor, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(_beside(folder), ignore_errors=True)
        if last:
            raise
        rank_zero_warn(f"{folder} could not be written, training goes on: {error}")


class ExportingCheckpoint(BetweenSteps):
    """Lightning's checkpoints; each kept one has a folder in Hugging Face format beside it, of the same name.

    After a resume, those that the interrupted run saved beyond what it goes on from are removed.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove what no checkpoint of this run knows of."""
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is None or not trainer.is_global_zero or self.dirpath is None:
            return
        known = {Path(path).with_suffix("") for path in self.best_k_models}
        mine = re.sub(r"\{(\w+)[^}]*\}", r"\1=*", self.filename or "")
        for path in Path(self.dirpath).glob(f"{mine}.ckpt"):
            if path.with_suffix("") not in known:
                path.unlink()
        for path in Path(self.dirpath).glob(mine):
            if path.is_dir() and path not in known:
                shutil.rmtree(path)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        export_trained(trainer, Path(filepath).with_suffix(""))

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero and not Path(filepath).exists():
            shutil.rmtree(Path(filepath).with_suffix(""), ignore_errors=True)
