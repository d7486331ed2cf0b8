"""Tiny random Hugging Face models and probes for them."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_TOKEN = 3


def tiny_llava(
    seed=0,
    layers=3,
    dropout=0.0,
    vocab_size=64,
    image_token=IMAGE_TOKEN,
    vision_layers=2,
    feature_layer=-1,
    text=None,
):
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
    )
    text = text or LlamaConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=vocab_size,
        attention_dropout=dropout,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def tiny_batch(seed=0, batch=4, before=2, after=7, patches=10, padded=2, labels=True):
    """Text, an image of 9 patches and CLS, text, then padding for the last sample."""
    generator = torch.Generator().manual_seed(seed)
    length = before + patches + after
    input_ids = torch.randint(4, 64, (batch, length), generator=generator)
    input_ids[:, before : before + patches] = IMAGE_TOKEN
    attention_mask = torch.ones_like(input_ids)
    if padded:
        attention_mask[-1, -padded:] = 0
        input_ids[-1, -padded:] = 0
    made = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(batch, 3, 12, 12, generator=generator),
    }
    if labels:
        made["labels"] = torch.where(attention_mask.bool() & (input_ids != IMAGE_TOKEN), input_ids, -100)
    return made


def save_tiny_llava(folder, processor, **options):
    """A tiny LLaVA that knows a processor's tokens, and the processor, in a folder."""
    tokens = {"vocab_size": len(processor.tokenizer), "image_token": processor.image_token_id}
    tiny_llava(**tokens, **options).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


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
