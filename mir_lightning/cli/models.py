"""Models and processors from whatever a user points at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import nn

from mir_lightning.cli.options import ModelOptions
from mir_lightning.files import read_json
from mir_lightning.functional.checks import check_loaded
from mir_lightning.hardware import cpu_dtype, warn_of_slow_bfloat16
from mir_lightning.llava.demo import weights  # noqa: F401  registers the packaged model's vision encoder
from mir_lightning.llava.model import saving


def load_model(source: str, options: ModelOptions) -> nn.Module:
    """The model at ``source``: a folder or hub id, an adapter's folder, or the recipe's Lightning checkpoint."""
    dtype: torch.dtype | None = None if options.dtype == "auto" else getattr(torch, options.dtype)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(best if options.device == "auto" else options.device)
    on_cpu = options.device_map is None and device.type == "cpu"
    if on_cpu and dtype == torch.bfloat16:
        warn_of_slow_bfloat16("--dtype bfloat16", "--dtype float32")
    base = base_of_adapter(source)
    if source.lower().endswith(".ckpt"):
        return nn.Module.to(saving.load_vlm(source), device, dtype).eval()
    spread = {} if options.device_map is None else {"device_map": options.device_map}
    model: nn.Module = saving.load_vlm(base or source, dtype=dtype or "auto", **spread)
    if base:
        with saving.naming(source):
            model = PeftModel.from_pretrained(model, source)
            _check_adapter(model, source)
    if options.device_map is None:
        saved = next(model.parameters()).dtype
        nn.Module.to(model, device, cpu_dtype(saved) if on_cpu and dtype is None else None)
    return model.eval()


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
    """The base model that an adapter's folder names, a ``ValueError`` without; ``None`` of any other folder."""
    config = Path(source) / "adapter_config.json"
    if not config.is_file():
        return None
    found = read_json(config)
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    if not isinstance(base, str) or not base:
        raise ValueError(f"{config} names no base model (base_model_name_or_path).")
    return base


def load_processor(source: str, place: str | None = None) -> Any:
    """The processor at ``place``, or beside a model, its adapter's base, or its checkpoint."""
    base = base_of_adapter(source)
    return saving.load_processor(place or (base if base and not saving.has_processor(Path(source)) else source))
