"""What trains when: parts of a model with their learning rates, in one stage or several."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mir_lightning.functional.checks import check_at_least_one, check_choice
from mir_lightning.vlm import PartName, find_decoder, parameters_of


@dataclass(frozen=True)
class Part:
    """A part of the model that trains in a stage.

    Args:
        module: ``"projector"``, ``"vision"`` (the encoder), ``"llm"``, ``"lora"`` (adapters in the LLM) or
            ``"moca"``.
        lr: peak learning rate, or ``"mm1"``: MM1's, by the size of the LLM
            (:func:`~mir_lightning.llava.model.mm1.mm1_rate`).
        layers: Python slice of the encoder's or the LLM's layers, ``"12:"`` from the 13th on, ``":16"`` the first
            16; None for the whole module, with embeddings, final norm and output head.
        weight_decay: of its matrices; norms, biases and MoCa get none. By default 0, or a tenth of MM1's rate.
    """

    module: PartName
    lr: float | Literal["mm1"]
    layers: str | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        check_choice("module", self.module, PartName)
        if self.lr != "mm1" and (isinstance(self.lr, str) or self.lr <= 0):
            raise ValueError(f'lr of {self.module} must be above 0, or "mm1", got {self.lr}.')
        if (self.weight_decay or 0) < 0:
            raise ValueError(f"weight_decay of {self.module} must be 0 or more, got {self.weight_decay}.")
        if self.layers is not None and self.module not in ("vision", "llm"):
            raise ValueError(f"layers can be chosen of vision and llm, not of {self.module}.")
        if self.layers is not None and not re.fullmatch(r"\d*:\d*", self.layers):
            raise ValueError(f'layers must be a slice such as "12:" or ":16", got {self.layers!r}.')


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
        modules = [part.module for part in self.train]
        if not modules:
            raise ValueError("train is empty: a stage needs at least one part that learns.")
        if len(set(modules)) < len(modules):
            raise ValueError(f"train names a module twice: {', '.join(modules)}.")
        if self.steps is not None and self.tokens is not None:
            raise ValueError("a stage lasts for steps or for tokens, not both.")
        lengths = {"steps": self.steps, "tokens": self.tokens}
        check_at_least_one(**{name: length for name, length in lengths.items() if length is not None})


def freeze_all_but(vlm: PreTrainedModel, stage: Stage) -> None:
    """Let exactly the stage's parameters learn; modules that hold one of them train, all others evaluate."""
    vlm.requires_grad_(False)
    for part in stage.train:
        for parameter in parameters_of(vlm, part.module, part.layers).values():
            parameter.requires_grad_(True)
    _set_modes(vlm, training=False)
    for layer in find_decoder(vlm).layers:
        if getattr(layer, "gradient_checkpointing", False):
            _recompute(layer, frozen=not layer.training)


def checkpoint_layers(vlm: PreTrainedModel) -> None:
    """Recompute the LLM's layers in the backward pass, from the next :func:`freeze_all_but` on.

    Of the LLM alone: transformers lets gradients into a frozen encoder too, which then keeps its activations.
    """
    decoder: Any = vlm.get_decoder()
    getattr(decoder, "activation_checkpointing_enable", decoder.gradient_checkpointing_enable)()


def _recompute(layer: nn.Module, frozen: bool) -> None:
    """Transformers recomputes layers in training mode only: a frozen one is in it, but for its own forward."""

    def run(forward: Any, *args: Any) -> Any:
        def evaluated(*given: Any) -> Any:
            layer.training = not frozen
            try:
                return forward(*given)
            finally:
                layer.training = True

        return checkpoint(evaluated, *args, use_reentrant=False)

    layer.training = True
    layer._gradient_checkpointing_func = run  # type: ignore[assignment]


def _set_modes(module: nn.Module, training: bool) -> None:
    """By whether something inside learns; what has no parameters, dropout for one, follows the module it is in."""
    parameters = list(module.parameters())
    module.training = any(p.requires_grad for p in parameters) if parameters else training
    for child in module.children():
        _set_modes(child, module.training)


@dataclass(frozen=True)
class Group:
    """Parameters that go through the stages together."""

    parameters: Mapping[str, nn.Parameter]  # by their names in the model
    parts: tuple[Part | None, ...]  # that they belong to in each stage; None where they are frozen
    decays: bool  # whether they get weight decay at all

    def weight_decay(self, stage: int) -> float:
        """In a stage."""
        part = self.parts[stage]
        return part.weight_decay or 0.0 if part is not None and self.decays else 0.0

    def lr(self, step: int, starts: Sequence[int], warmup: int, total: int) -> float:
        """Learning rate after so many steps of a run: linear warm-up from where the group joins, one cosine.

        ``starts`` are the steps at which each stage so far began.
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
        return float(part.lr) * rise * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def optimizer_groups(vlm: PreTrainedModel, stages: Sequence[Stage]) -> list[Group]:
    """All parameters that ever learn, grouped by what happens to them; the same order in every process."""
    owners: dict[str, list[Part | None]] = defaultdict(lambda: [None] * len(stages))
    found: dict[str, nn.Parameter] = {}
    for number, stage in enumerate(stages):
        for part in stage.train:
            owned = parameters_of(vlm, part.module, part.layers)
            found |= owned
            for name in owned:
                owners[name][number] = part
    groups: dict[tuple[tuple[Part | None, ...], bool], dict[str, nn.Parameter]] = defaultdict(dict)
    for name in sorted(found):
        decays = found[name].ndim > 1 and ".moca." not in name
        groups[tuple(owners[name]), decays][name] = found[name]
    return [Group(parameters, parts, decays) for (parts, decays), parameters in groups.items()]
