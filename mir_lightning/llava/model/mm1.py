"""MM1's rule for the peak learning rate and the weight decay of a language model, by its size."""

import math
from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from mir_lightning.llava.model.experts import expert_matrices
from mir_lightning.llava.model.stages import Part, Stage
from mir_lightning.vlm import parameters_of


def mm1_rate(parameters: int) -> float:
    """Peak learning rate of a language model with so many non-embedding parameters.

    exp(-0.4214 ln N - 0.5535), fitted from 9M to 1.2B (MM1, arXiv 2403.09611, section 4 and appendix B).
    """
    return math.exp(-0.4214 * math.log(parameters) - 0.5535)


def backbone_size(vlm: PreTrainedModel) -> int:
    """Parameters of the language model without embeddings and output head, N of :func:`mm1_rate`.

    The experts of a layer count as one: MM1 trains a mixture of experts at the rate of its dense backbone.
    """
    outside = {id(module.weight) for module in vlm.modules() if isinstance(module, nn.Embedding)}
    outside |= {id(p) for p in vlm.get_output_embeddings().parameters()}
    experts = expert_matrices(vlm)
    counted = (p for p in parameters_of(vlm, "llm").values() if id(p) not in outside)
    return sum(p.numel() // (len(p) if id(p) in experts else 1) for p in counted)


def resolved(vlm: PreTrainedModel, stages: Iterable[Stage]) -> list[Stage]:
    """The stages with numbers where they say ``lr: mm1``; its weight decay is a tenth of the rate (MM1)."""

    def numbers(part: Part) -> Part:
        if part.lr != "mm1":
            return part
        rate = mm1_rate(backbone_size(vlm))
        decay = 0.1 * rate if part.weight_decay is None else part.weight_decay
        return replace(part, lr=rate, weight_decay=decay)

    return [replace(stage, train=[numbers(part) for part in stage.train]) for stage in stages]
