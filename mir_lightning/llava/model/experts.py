"""Mixtures of experts in the LLM: what their routers say, and the losses that keep them in balance."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mir_lightning.vlm import find_decoder


@dataclass(frozen=True)
class RouterLosses:
    """Weights of the routers' losses, beside the cross-entropy; without effect on a dense model.

    Args:
        balance: of the load-balance loss (Switch Transformer, arXiv 2101.03961, equations 4 to 6).
        z: of the router z-loss (ST-MoE, arXiv 2202.08906, equation 5).
    """

    balance: float = 0.01
    z: float = 0.001

    def __post_init__(self) -> None:
        for name, weight in (("balance", self.balance), ("z", self.z)):
            if weight < 0:
                raise ValueError(f"{name} of router must be 0 or more, got {weight}.")


class Router(NamedTuple):
    """What chooses the experts of a decoder layer."""

    layer: int  # its number, from 1
    module: nn.Module
    output: int  # which of what the module returns are the logits


def find_routers(vlm: PreTrainedModel) -> list[Router]:
    """The routers of the LLM, by what transformers declares ``router_logits`` to be; none in a dense model."""
    declared: dict[type, int] = {}
    for model in vlm.modules():
        recorders: Any = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, (list, tuple)) else (recorders,):
            declared[recorder.target_class] = recorder.index
    return [
        Router(number, module, declared[type(module)])
        for number, layer in enumerate(find_decoder(vlm).layers if declared else (), start=1)
        for module in layer.modules()
        if type(module) in declared
    ]


@contextmanager
def recording(routers: Iterable[Router]) -> Iterator[list[Tensor]]:
    """The logits of routers that run inside, ``[tokens, experts]`` each; behind it nothing is left of this."""
    logits: list[Tensor] = []

    def keep(which: int, module: nn.Module, args: Any, output: Any) -> None:
        logits.append(output[which] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for router in routers:
            hooks.enter_context(router.module.register_forward_hook(partial(keep, router.output)))
        yield logits


def router_losses(logits: Sequence[Tensor], top_k: int, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Load-balance loss and z-loss, float32, each the mean of those of the layers; padding counts in neither.

    The first is ``experts * sum(f * P)``, with the share of tokens f that choose an expert among their ``top_k``
    and its mean probability P: ``top_k`` where all are chosen alike. The second is the mean of
    ``logsumexp(logits)^2``.

    Args:
        logits: of each router, ``[tokens, experts]``.
        top_k: experts that a token goes through.
        attention_mask: ``[B, S]``, 1 for tokens and 0 for padding.

    Raises:
        ValueError: if the routers have seen another number of tokens.
    """
    rows = [layer.flatten(0, -2).float() for layer in logits]
    if any(len(layer) != attention_mask.numel() for layer in rows):
        raise ValueError(
            f"router: the routers saw {len(rows[0])} tokens of {attention_mask.numel()} in the batch, so padding "
            "cannot be told: set model.router to null."
        )
    valid = attention_mask.flatten().float()
    switch: Any = load_balancing_loss_func  # over several layers it would pool their experts by number
    balance = [switch((layer,), layer.shape[-1], top_k, valid) for layer in rows]
    z = [(layer.logsumexp(dim=-1).square() * valid).sum() / valid.sum() for layer in rows]
    return torch.stack(balance).mean(), torch.stack(z).mean()


def expert_load(
    routers: Sequence[Router], logits: Sequence[Tensor], top_k: int, attention_mask: Tensor
) -> dict[str, float]:
    """How much more than its share each layer's busiest expert gets, ``moe/load/layer_01`` and on.

    1 where all experts are chosen alike, ``experts / top_k`` where all tokens choose the same ones.
    """
    values = {}
    for router, layer in zip(routers, logits, strict=True):
        rows = layer.detach().flatten(0, -2)[attention_mask.flatten().bool()]
        chosen = rows.topk(top_k).indices.flatten().bincount(minlength=rows.shape[-1])
        values[f"moe/load/layer_{router.layer:02d}"] = (chosen.max() / chosen.sum() * len(chosen)).item()
    return values


def expert_matrices(vlm: PreTrainedModel) -> set[int]:
    """Ids of the parameters that hold all experts of a layer, ``[experts, ...]``; none of a dense model."""
    config = vlm.config.get_text_config(decoder=True)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), None)
    return {id(p) for p in vlm.parameters() if p.ndim == 3 and len(p) == experts}
