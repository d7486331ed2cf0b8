"""Models and processors from whatever a user points at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import nn
from transformers import AutoConfig, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from mir_lightning.cli.options import EvaluationOptions
from mir_lightning.files import read_json, regular_file
from mir_lightning.functional.checks import check_loaded
from mir_lightning.hardware import cpu_dtype, warn_of_slow_bfloat16
from mir_lightning.llava.demo import weights  # noqa: F401  registers the packaged model's vision encoder
from mir_lightning.llava.model.saving import has_processor, load_vlm, processor_place


def load_model(source: str, options: EvaluationOptions) -> nn.Module:
    """The model at ``source``: a folder or hub id, an adapter's folder, or the recipe's Lightning checkpoint.

    Raises:
        ValueError: if ``source`` is none of them, is damaged, or lacks weights or holds others.
        OSError: if nothing can be loaded from it.
    """
    dtype: torch.dtype | None = None if options.dtype == "auto" else getattr(torch, options.dtype)
    device = torch.device(
        options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    on_cpu = options.device_map is None and device.type == "cpu"
    if on_cpu and dtype == torch.bfloat16:
        warn_of_slow_bfloat16("--dtype bfloat16", "--dtype float32")
    base = base_of_adapter(source)
    with _named(source):
        if source.endswith(".ckpt"):
            return nn.Module.to(load_vlm(source), device, dtype).eval()
        spread = {} if options.device_map is None else {"device_map": options.device_map}
        # sizes that do not fit are refused after the loading, by name
        model: nn.Module = load_vlm(base or source, dtype=dtype or "auto", ignore_mismatched_sizes=True, **spread)
        if base:
            model = PeftModel.from_pretrained(model, source)
            _check_adapter(model, source)
    if options.device_map is None:
        saved = next(model.parameters()).dtype
        nn.Module.to(model, device, cpu_dtype(saved) if on_cpu and dtype is None else None)
    return model.eval()


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Errors of libraries that do not say what they read become a ``ValueError`` that does."""
    try:
        yield
    except Exception as error:
        said = str(error)
        if (
            isinstance(error, ImportError)
            or said.startswith(place)
            or (isinstance(error, OSError) and place in said)
        ):
            raise
        raise ValueError(f"{place} cannot be loaded: {said} ({type(error).__name__}).") from error


def _check_adapter(model: PeftModel, source: str) -> None:
    """Raise a ``ValueError`` for what peft does without: weights that an adapter's file lacks, or has too much."""
    given = set(load_peft_weights(source, "cpu"))
    needed, known = (set(get_peft_model_state_dict(model, save_embedding_layers=each)) for each in (False, True))
    if needed <= given <= known:
        return
    placed = model.load_adapter(source, "default")  # which also knows the names of older transformers
    if placed.missing_keys or placed.unexpected_keys or len(given) < len(needed):
        found = {"missing_keys": needed - given, "mismatched_keys": (), "unexpected_keys": given - known}
        check_loaded(source, found)


def base_of_adapter(source: str) -> str | None:
    """The base model that an adapter's folder names; ``None`` if ``source`` is no such folder.

    Raises:
        ValueError: if it names none, or one of the two folders holds a pipe.
    """
    _check_no_pipes(source)
    config = Path(source) / "adapter_config.json"
    if not config.is_file():
        return None
    found = read_json(config)
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    if not isinstance(base, str) or not base:
        raise ValueError(f"{config} names no base model (base_model_name_or_path).")
    _check_no_pipes(base)
    return base


def _check_no_pipes(place: str) -> None:
    """Those who load a folder would wait forever for what is written into a pipe."""
    for path in (Path(place), *Path(place).glob("*")):
        if path.exists() and not path.is_dir():
            regular_file(path)


def load_processor(source: str, place: str | None = None) -> Any:
    """The processor at ``place``, or beside a model, its adapter's base, or its checkpoint.

    Raises:
        ValueError: if none is beside a checkpoint, or it is damaged.
        ImportError: if it needs a library that is not installed.
    """
    base = base_of_adapter(source)
    place = place or processor_place(base if base and not has_processor(Path(source)) else source)
    _check_no_pipes(place)
    try:
        with _named(place):
            return AutoProcessor.from_pretrained(place)
    except ImportError as error:
        return _without_video_processor(place, error)


def _without_video_processor(place: str, error: ImportError) -> Any:
    """A processor whose video part cannot be built here, for want of torchvision, serves images without it."""
    name = PROCESSOR_MAPPING_NAMES.get(AutoConfig.from_pretrained(place).model_type)
    kind = processor_class_from_name(name) if isinstance(name, str) else None
    parts = [] if kind is None else [*kind.get_attributes()]
    try:
        if kind is None or "video_processor" not in parts:
            raise error
        parts.remove("video_processor")
        images_only: Any = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: parts)})
        return images_only.from_pretrained(place)
    except ImportError as second:
        raise ImportError(
            f"the processor at {place} needs torchvision: pip install torchvision ({second})"
        ) from second
