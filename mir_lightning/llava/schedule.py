"""What trains when: parts of a model with their learning rates, in one stage or several."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from mir_lightning.functional.checks import check_at_least_one, check_choice
from mir_lightning.vlm import find_decoder, shallowest_list

PartName = Literal["projector", "vision", "llm", "lora", "moca"]

_SLICE = re.compile(r"(\d*):(\d*)")
_AFTER_THE_FEATURES = re.compile(r"(^|\.)(post_layernorm|layernorm|head|pooler)\.")


@dataclass(frozen=True)
class Part:
    """A part of the model that trains in a stage.

    Args:
        module: ``"projector"``, ``"vision"`` (the encoder), ``"llm"``, ``"lora"`` (adapters in the LLM) or
            ``"moca"``.
        lr: peak learning rate.
        layers: Python slice of the encoder's or the LLM's layers, ``"12:"`` from the 13th on, ``":16"`` the first
            16; None for the whole module, with embeddings, final norm and output head.
        weight_decay: of its matrices; norms, biases and MoCa get none.
    """

    module: PartName
    lr: float
    layers: str | None = None
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_choice("module", self.module, PartName)
        if self.lr <= 0:
            raise ValueError(f"lr of {self.module} must be above 0, got {self.lr}.")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay of {self.module} must be 0 or more, got {self.weight_decay}.")
        if self.layers is not None:
            if self.module not in ("vision", "llm"):
                raise ValueError(f"layers can be chosen of vision and llm, not of {self.module}.")
            if not _SLICE.fullmatch(self.layers):
                raise ValueError(f'layers must be a slice such as "12:" or ":16", got {self.layers!r}.')

    def chosen(self, total: int) -> range:
        """Indices of its layers out of ``total``; a ``ValueError`` if there are none or the slice goes beyond."""
        match = _SLICE.fullmatch(self.layers or ":")
        assert match is not None
        start, end = int(match[1] or 0), int(match[2] or total)
        if not 0 <= start < end <= total:
            raise ValueError(f"layers={self.layers!r} of {self.module}: the model has {total}.")
        return range(start, end)


@dataclass(frozen=True)
class Stage:
    """What trains for a while.

    Args:
        train: the parts that learn; everything else is frozen and in evaluation mode.
        steps: optimizer steps the stage lasts.
        tokens: tokens trained on that it lasts, over all ranks. Without either it lasts to the end of the run.
    """

    train: Sequence[Part]
    steps: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train is empty: a stage needs at least one part that learns.")
        named = [(part.module, part.layers) for part in self.train]
        if len({module for module, _ in named}) < len(named):
            raise ValueError(f"train names a module twice: {', '.join(module for module, _ in named)}.")
        if self.steps is not None and self.tokens is not None:
            raise ValueError("a stage lasts for steps or for tokens, not both.")
        for name in ("steps", "tokens"):
            if (value := getattr(self, name)) is not None:
                check_at_least_one(**{name: value})


def check_stages(stages: Sequence[Stage]) -> None:
    """A ``ValueError`` unless every stage but the last says how long it lasts, and the last does not."""
    if not stages:
        raise ValueError("stages is empty: at least one is needed.")
    for number, stage in enumerate(stages, start=1):
        bounded = stage.steps is not None or stage.tokens is not None
        if bounded != (number < len(stages)):
            trouble = "is the last and must not say its length" if bounded else "must say its steps or tokens"
            raise ValueError(f"stage {number} of {len(stages)} {trouble}: only the last one runs to the end.")


def parameters_of(vlm: PreTrainedModel, part: Part) -> dict[str, nn.Parameter]:
    """Parameters of a part by their names in the model; those that no gradient can reach are left out.

    Raises:
        ValueError: if the model has no such part.
    """
    owned = _module_parameters(vlm, part)
    if not owned:
        raise ValueError(
            f"{type(vlm).__name__} has no parameters of {part.module}: looked for {_LOOKED_FOR[part.module]}."
        )
    return owned


_LOOKED_FOR: dict[str, str] = {
    "projector": "a module named *projector, *connector or merger",
    "vision": "a module named vision_tower, vision_model or visual",
    "llm": "the text decoder",
    "lora": "LoRA adapters (give the lora option)",
    "moca": "MoCa modules (set moca to true)",
}
_PROJECTOR = re.compile(r"(^|\.)(\w*projector|connector|merger)$")
_VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual)$")


def _module_parameters(vlm: PreTrainedModel, part: Part) -> dict[str, nn.Parameter]:
    everything = dict(vlm.named_parameters())
    if part.module == "lora":
        return {name: p for name, p in everything.items() if ".lora_" in name}
    if part.module == "moca":
        return {name: p for name, p in everything.items() if ".moca." in name}
    if part.module == "projector":
        return _under(everything, _outermost(vlm, _PROJECTOR))
    tower = _outermost(vlm, _VISION)
    if part.module == "vision":
        return _vision_parameters(vlm, tower, part, everything)
    adapters = {name for name in everything if ".lora_" in name or ".moca." in name}
    outside = adapters | _under(everything, tower).keys() | _under(everything, _outermost(vlm, _PROJECTOR)).keys()
    if part.layers is None:
        return {name: p for name, p in everything.items() if name not in outside}
    layers = find_decoder(vlm).layers
    owned = {id(p) for index in part.chosen(len(layers)) for p in layers[index].parameters()}
    return {name: p for name, p in everything.items() if id(p) in owned and name not in outside}


def _vision_parameters(
    vlm: PreTrainedModel, tower: str | None, part: Part, everything: dict[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Of the encoder up to the layer whose features are used; nothing behind it ever gets a gradient."""
    if tower is None:
        return {}
    module = vlm.get_submodule(tower)
    _, layers = shallowest_list(module, getattr(module.config, "num_hidden_layers", None))
    owned = _under(everything, tower)
    if layers is None:
        if part.layers is not None:
            raise ValueError(
                f"layers={part.layers!r}: the vision encoder {type(module).__name__} has no list of layers."
            )
        return owned
    feature_layer = getattr(vlm.config, "vision_feature_layer", -1)
    last = max(feature_layer) if isinstance(feature_layer, (list, tuple)) else feature_layer
    used = last if last >= 0 else len(layers) + 1 + last  # hidden_states[0] is the embedding
    kept = {id(p) for index in part.chosen(len(layers)) if index < used for p in layers[index].parameters()}
    in_layers = {id(p) for p in layers.parameters()}
    return {
        name: p
        for name, p in owned.items()
        if id(p) in kept
        or (part.layers is None and id(p) not in in_layers and not _AFTER_THE_FEATURES.search(name[len(tower) :]))
    }


def _outermost(vlm: nn.Module, pattern: re.Pattern[str]) -> str | None:
    return next((name for name, _ in vlm.named_modules() if pattern.search(name)), None)


def _under(parameters: dict[str, nn.Parameter], module: str | None) -> dict[str, nn.Parameter]:
    return {} if module is None else {n: p for n, p in parameters.items() if n.startswith(f"{module}.")}


def freeze_all_but(vlm: PreTrainedModel, stage: Stage) -> None:
    """Let exactly the stage's parameters learn; modules that hold one of them train, all others evaluate."""
    vlm.requires_grad_(False)
    vlm.eval()
    for part in stage.train:
        for parameter in parameters_of(vlm, part).values():
            parameter.requires_grad_(True)
    _set_modes(vlm, training=False)


def _set_modes(module: nn.Module, training: bool) -> None:
    """By whether something inside learns; what has no parameters, dropout for one, follows the module it is in."""
    parameters = list(module.parameters())
    module.training = any(p.requires_grad for p in parameters) if parameters else training
    for child in module.children():
        _set_modes(child, module.training)


@dataclass(frozen=True)
class Group:
    """Parameters that go through the stages together.

    Attributes:
        names: of the parameters.
        parameters: that learn.
        parts: the part they belong to in each stage; ``None`` where they are frozen.
        decays: whether they get weight decay at all.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    parts: tuple[Part | None, ...]
    decays: bool

    def weight_decay(self, stage: int) -> float:
        """In a stage."""
        part = self.parts[stage]
        return part.weight_decay if part is not None and self.decays else 0.0

    def lr(self, step: int, starts: Sequence[int], warmup: int, total: int) -> float:
        """Learning rate of an optimizer step: linear warm-up from where the group joins, one cosine over the run.

        Args:
            step: optimizer steps done.
            starts: step at which each stage so far began.
            warmup: steps of warm-up.
            total: steps of the run.
        """
        stage = sum(start <= step for start in starts) - 1
        part = self.parts[stage]
        if part is None:
            return 0.0
        joined = stage
        while joined > 0 and self.parts[joined - 1] is not None:
            joined -= 1
        rise = min(1.0, (step - starts[joined]) / warmup) if warmup else 1.0
        progress = max(0, step - warmup) / max(1, total - warmup)
        return part.lr * rise * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def optimizer_groups(vlm: PreTrainedModel, stages: Sequence[Stage]) -> list[Group]:
    """All parameters that ever learn, grouped by what happens to them; the same order in every process."""
    owners: dict[str, list[Part | None]] = {}
    found: dict[str, nn.Parameter] = {}
    for number, stage in enumerate(stages):
        for part in stage.train:
            for name, parameter in parameters_of(vlm, part).items():
                found[name] = parameter
                owners.setdefault(name, [None] * len(stages))[number] = part
    groups: dict[tuple[tuple[Part | None, ...], bool], list[str]] = {}
    for name in sorted(found):
        decays = found[name].ndim > 1 and ".moca." not in name
        groups.setdefault((tuple(owners[name]), decays), []).append(name)
    return [
        Group(tuple(names), tuple(found[name] for name in names), parts, decays)
        for (parts, decays), names in groups.items()
    ]


def stage_table(vlm: PreTrainedModel, stage: Stage) -> str:
    """The stage as a person reads it: module, layers, parameters, trainable, learning rate, weight decay."""
    rows = [("module", "layers", "parameters", "trainable", "lr", "weight decay")]
    for module in get_args(PartName):
        part = next((part for part in stage.train if part.module == module), None)
        total = _count(_module_parameters(vlm, Part(module, 1.0)).values())
        if not total:
            continue
        trainable = _count(parameters_of(vlm, part).values()) if part else 0
        layers = "-" if part is None else part.layers or "all"
        rates = (f"{part.lr:g}", f"{part.weight_decay:g}") if part else ("-", "-")
        rows.append((module, layers, f"{total:,}", f"{trainable:,}", *rates))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(_aligned(row, widths) for row in rows)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells: Iterator[str] = (
        cell.ljust(width) if place < 2 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip()


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
