"""Models and processors from whatever a user points at."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from mir_lightning.functional.checks import check_loaded
from mir_lightning.hardware import cpu_dtype, warn_of_slow_bfloat16
from mir_lightning.llava.demo import weights  # noqa: F401  registers the packaged model's vision encoder
from mir_lightning.llava.model.saving import has_processor, load_vlm, processor_place


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Where and how to run the model."""
    parser.add_argument("--processor", help="folder or hub id of the processor, if it is not beside the model")
    parser.add_argument("--device", default="auto", help='torch device, or "auto": cuda if there is one')
    parser.add_argument(
        "--device-map", metavar="MAP", help='"auto" spreads the model over devices (needs accelerate)'
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help='of the weights; "auto" is the saved one, on a CPU float32 where it would have to emulate that',
    )


def load_model(source: str, options: argparse.Namespace) -> nn.Module:
    """The model at ``source``: a folder or hub id, an adapter's folder, or the recipe's Lightning checkpoint.

    Raises:
        ValueError: if ``source`` is none of them.
        OSError: if nothing can be loaded from it.
    """
    dtype: torch.dtype | None = None if options.dtype == "auto" else getattr(torch, options.dtype)
    on_cpu = options.device_map is None and _device(options).type == "cpu"
    if on_cpu and dtype == torch.bfloat16:
        warn_of_slow_bfloat16("--dtype bfloat16", "--dtype float32")
    if source.endswith(".ckpt"):
        return nn.Module.to(load_vlm(source), _device(options), dtype).eval()
    arguments: dict[str, Any] = {"dtype": dtype or "auto"}
    if options.device_map is not None:
        arguments["device_map"] = options.device_map
    model: nn.Module = load_vlm(base_of_adapter(source) or source, **arguments)
    if base_of_adapter(source):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, source)
        _check_adapter(model, Path(source))
    if options.device_map is None:
        saved = next(model.parameters()).dtype
        nn.Module.to(model, _device(options), cpu_dtype(saved) if on_cpu and dtype is None else None)
    return model.eval()


def _check_adapter(model: Any, folder: Path) -> None:
    """Raise a ``ValueError`` that names what an adapter's file lacks or holds beyond the adapter; peft goes on."""
    from peft import get_peft_model_state_dict

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return
    with safe_open(file, "pt") as tensors:
        given = set(tensors.keys())
    own = set(get_peft_model_state_dict(model))
    check_loaded(folder, {"missing_keys": own - given, "mismatched_keys": (), "unexpected_keys": given - own})


def _device(options: argparse.Namespace) -> torch.device:
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(options.device)


def base_of_adapter(source: str) -> str | None:
    """The base model that an adapter's folder names; ``None`` if ``source`` is no such folder."""
    config = Path(source) / "adapter_config.json"
    if not config.is_file():
        return None
    base = json.loads(config.read_text("utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{config} names no base model (base_model_name_or_path).")
    return str(base)


def load_processor(source: str, options: argparse.Namespace) -> Any:
    """The processor of a model: ``--processor``, or beside the model, its adapter's base, or its checkpoint.

    Raises:
        ValueError: if none is beside a checkpoint.
        ImportError: if it needs a library that is not installed.
    """
    places = [options.processor, source, base_of_adapter(source)]
    if options.processor is None and source.endswith(".ckpt"):
        places = [processor_place(source)]
    elif options.processor is None and base_of_adapter(source) and not has_processor(Path(source)):
        places = [base_of_adapter(source)]
    place = next(place for place in places if place)
    try:
        return AutoProcessor.from_pretrained(place)
    except ImportError as error:
        return _without_video_processor(place, error)


def _without_video_processor(place: str, error: ImportError) -> Any:
    """A processor whose video part cannot be built here, for want of torchvision, serves images without it."""
    name = PROCESSOR_MAPPING_NAMES.get(AutoConfig.from_pretrained(place).model_type)
    kind = processor_class_from_name(name) if isinstance(name, str) else None
    hint = f"the processor at {place} needs torchvision: pip install torchvision"
    if kind is None or "video_processor" not in kind.get_attributes():
        raise ImportError(f"{hint} ({error})") from error
    parts = [part for part in kind.get_attributes() if part != "video_processor"]
    images_only: Any = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: parts)})
    try:
        return images_only.from_pretrained(place)
    except ImportError as second:
        raise ImportError(f"{hint} ({second})") from second
