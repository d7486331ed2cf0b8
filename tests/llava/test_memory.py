import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mir_lightning.llava.memory import training_memory
from mir_lightning.llava.schedule import Part, Stage
from tests.models import tiny_llava

PROJECTOR, EVERYTHING = (Part("projector", 1e-3),), (Part("projector", 1e-3), Part("llm", 1e-3))


def llava_7b():
    """LLaVA-1.5's shapes, without memory for them."""
    with torch.device("meta"):
        vision = CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=768,
        )  # fmt: skip
        return LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32064))
        )


def test_equals_what_training_allocates():
    """Weights, gradients and both moments of AdamW, counted after a step."""
    vlm = tiny_llava()
    for stages in ([Stage(PROJECTOR)], [Stage(PROJECTOR, steps=1), Stage(EVERYTHING)]):
        memory = training_memory(vlm, stages)
        learning = [
            p
            for name, p in vlm.named_parameters()
            if "projector" in name or (len(stages) > 1 and "vision_tower" not in name)
        ]
        optimizer = torch.optim.AdamW(learning)
        for parameter in learning:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        assert memory.weights == sum(p.nbytes for p in vlm.parameters())
        assert memory.gradients == sum(p.grad.nbytes for p in learning)
        assert memory.optimizer == sum(moment.nbytes for moment in moments)


@pytest.mark.parametrize(
    ("train", "shards", "gigabytes"), [(PROJECTOR, 1, 28.5), (EVERYTHING, 1, 109.4), (EVERYTHING, 8, 13.7)]
)
def test_a_7b_as_the_docs_say(train, shards, gigabytes):
    memory = training_memory(llava_7b(), [Stage(train)], shards)
    assert f"{sum(memory) / 1e9:.1f}" == f"{gigabytes}"
    assert str(memory).startswith(f"{gigabytes} GB a device: weights")
