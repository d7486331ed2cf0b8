"""Sparse upcycling: a dense language model becomes a mixture of experts that starts as the same function."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from mir_lightning.functional.checks import check_at_least_one

_KINDS = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class Upcycling:
    """How experts are put into a dense LLM (MM1, arXiv 2403.09611, section 4: 64, 2, 2 of 3B; 32, 4, 2 of 7B).

    Args:
        experts: in each sparse layer.
        every: how many layers there are to a sparse one, the last of them; 1 for all.
        top_k: experts that a token goes through.
        seed: of the routers.
    """

    experts: int
    every: int = 2
    top_k: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least_one(every=self.every, top_k=self.top_k)
        if self.experts < self.top_k:
            raise ValueError(f"experts must be at least top_k, {self.top_k}, got {self.experts}.")


def upcycle(llm: PreTrainedModel, options: Upcycling) -> PreTrainedModel:
    """A mixture of experts each of which is the dense layer's MLP, with new routers (arXiv 2212.05055).

    It is a ``Qwen2MoeForCausalLM``, which has Llama's attention and sparse layers among dense ones, with a shared
    expert of width 0. The weights of a token's experts sum to 1: its first output is the dense model's.

    Raises:
        ValueError: for an LLM of another kind than Llama, Mistral or Qwen2, or one with a window or biases that
            would be lost; or if ``every`` is beyond its layers.
    """
    dense = llm.config
    if dense.model_type not in _KINDS or (dense.model_type == "mistral" and dense.sliding_window):
        raise ValueError(
            f"upcycle takes an LLM of {', '.join(_KINDS)} (of mistral without sliding_window), got "
            f"{dense.model_type}: give the mixture of experts itself as model.llm."
        )
    layers = dense.num_hidden_layers
    if options.every > layers:
        raise ValueError(f"every must be at most the number of layers, {layers}, got {options.every}.")
    state = llm.state_dict()
    carried = {key: value for key, value in dense.to_dict().items() if key not in ("model_type", "architectures")}
    config = Qwen2MoeConfig(
        **carried,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in state,
        decoder_sparse_step=options.every,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        norm_topk_prob=True,
        moe_intermediate_size=dense.intermediate_size,
        shared_expert_intermediate_size=0,
    )
    generator = torch.Generator().manual_seed(options.seed)
    for layer in range(options.every - 1, layers, options.every):
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (state.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        router = torch.randn(options.experts, dense.hidden_size, generator=generator) * dense.initializer_range
        state |= {
            f"{mlp}.gate.weight": router,
            f"{mlp}.experts.gate_up_proj": torch.cat([gate, up]).repeat(options.experts, 1, 1),
            f"{mlp}.experts.down_proj": down.repeat(options.experts, 1, 1),
            f"{mlp}.shared_expert.gate_proj.weight": gate[:0],
            f"{mlp}.shared_expert.up_proj.weight": up[:0],
            f"{mlp}.shared_expert.down_proj.weight": down[:, :0],
            f"{mlp}.shared_expert_gate.weight": torch.zeros(1, dense.hidden_size),
        }
    wanted: dict[str, Any] = {"dtype": llm.dtype, "attn_implementation": dense._attn_implementation}
    kind: Any = Qwen2MoeForCausalLM
    sparse, found = kind.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, **wanted)
    if lost := sorted(found["unexpected_keys"]):
        raise ValueError(f"upcycle: a mixture of experts has no place for {lost[0]} of the LLM.")
    sparse.generation_config = llm.generation_config
    return sparse
