"""Any language model with any encoder, joined and loaded from folders."""

import pytest
import torch
from PIL import Image
from transformers import CLIPModel, Dinov2Model, LlamaForCausalLM, Qwen2ForCausalLM, SiglipModel

from mir_lightning.llava.model.backbones import ModelSource, build_model, build_processor


@pytest.mark.parametrize("llm", ["llama", "qwen"])
@pytest.mark.parametrize("select", ["default", "full"])
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_an_llm_and_an_encoder_become_a_llava(parts, llm, vision, select):
    source = ModelSource(llm=str(parts / llm), vision=str(parts / vision), feature_select=select)
    processor = build_processor(source)
    model = build_model(source, processor).eval()
    inputs = processor(
        images=[Image.new("RGB", (20, 30), "red")], text=["<image>hello there, friend"], return_tensors="pt"
    )
    has_cls = vision != "siglip"
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16 + (has_cls and select == "full")
    language_model = (LlamaForCausalLM if llm == "llama" else Qwen2ForCausalLM).from_pretrained(parts / llm)
    assert model.generation_config.eos_token_id == language_model.generation_config.eos_token_id == 7
    text = {"input_ids": inputs["input_ids"][:, -2:], "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
        torch.testing.assert_close(
            model(**text).logits[..., : language_model.vocab_size], language_model(**text).logits
        )
    encoder = {"clip": CLIPModel, "siglip": SiglipModel, "dinov2": Dinov2Model}[vision].from_pretrained(
        parts / vision
    )
    expected = getattr(encoder, "vision_model", encoder).state_dict()
    loaded = model.model.vision_tower.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_sources_that_contradict_themselves():
    with pytest.raises(ValueError, match="give vlm, or llm and vision, not both"):
        ModelSource(vlm="a", llm="b", vision="c")
    with pytest.raises(ValueError, match="llm and vision go together, got llm='b', vision=None"):
        ModelSource(llm="b")
