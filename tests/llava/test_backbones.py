"""Any language model with any encoder, joined and loaded from folders."""

import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from mir_lightning.llava.model.backbones import ModelSource, build_model, build_processor
from tests.families import TEXT, VISION

_SMALL_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
_CROP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_processor):
    """Folders of two language models and three encoders, as the hub has them."""
    root = tmp_path_factory.mktemp("parts")
    tokenizer = tiny_processor.tokenizer
    text = {**TEXT, "vocab_size": len(tokenizer)}
    for name, model in (
        ("llama", LlamaForCausalLM(LlamaConfig(**text))),
        ("qwen", Qwen2ForCausalLM(Qwen2Config(**text, tie_word_embeddings=True))),
    ):
        model.generation_config.eos_token_id = 7
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    both = {"vision_config": VISION, "text_config": {**_SMALL_TEXT, "vocab_size": 10}}
    bare = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    for name, model, images in (
        ("clip", CLIPModel(CLIPConfig(**both)), CLIPImageProcessorPil(**_CROP)),
        ("siglip", SiglipModel(SiglipConfig(**both)), SiglipImageProcessorPil(size=_CROP["crop_size"])),
        ("dinov2", Dinov2Model(Dinov2Config(**bare)), BitImageProcessorPil(**_CROP)),
    ):
        model.save_pretrained(root / name)
        images.save_pretrained(root / name)
    return root


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
