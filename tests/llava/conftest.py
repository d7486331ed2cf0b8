"""Folders of language models and encoders."""

import pytest
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

from tests.families import TEXT, VISION

_SMALL_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
_CROP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


@pytest.fixture(scope="session")
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
