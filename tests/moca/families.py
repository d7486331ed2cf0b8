"""Tiny random models of several families, inputs with images where a layout says, and a slow reference."""

from contextlib import contextmanager

import torch
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from mir_lightning.moca import inject_moca, moca_parameters
from tests.models import IMAGE_TOKEN, tiny_llava

_TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_llama(layers=3):
    return LlamaForCausalLM(LlamaConfig(**{**_TEXT, "num_hidden_layers": layers}))


def tiny_falcon():
    """Its layers give tuples."""
    return FalconForCausalLM(
        FalconConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=64, pad_token_id=0)
    )


def _qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 4], "rope_theta": 10000.0}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={**_TEXT, "rope_parameters": rope},
            vision_config={
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": 24,
                "num_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            image_token_id=IMAGE_TOKEN,
            video_token_id=61,
            vision_start_token_id=62,
            vision_end_token_id=63,
        )
    )


def _idefics3():
    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config=LlamaConfig(**_TEXT),
            vision_config={**_VISION, "image_size": 16, "patch_size": 4},
            scale_factor=2,
            image_token_id=IMAGE_TOKEN,
            pad_token_id=0,
        )
    )


def _gemma3():
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**_TEXT, "head_dim": 12, "sliding_window": 8},
            vision_config={**_VISION, "image_size": 16, "patch_size": 4},
            mm_tokens_per_image=4,
            image_token_id=IMAGE_TOKEN,
            boi_token_id=62,
            eoi_token_id=63,
        )
    )


def _kosmos2():
    text = {"embed_dim": 24, "layers": 3, "ffn_dim": 48, "attention_heads": 2, "vocab_size": 64}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 64}
    return Kosmos2ForConditionalGeneration(
        Kosmos2Config(
            text_config={**text, **special},
            vision_config={**_VISION, "image_size": 8, "patch_size": 4},
            latent_query_num=4,
        )
    )


def _images(count, size):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def _qwen_images(rows):
    count = sum(rows)
    flat = _images(count * 16, 4).repeat(1, 2, 1, 1).flatten(1)  # 4 x 4 patches of 2 frames
    return {"pixel_values": flat, "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}


def _idefics_images(rows):
    pixels = torch.zeros(len(rows), max(rows), 3, 16, 16)
    for row, count in enumerate(rows):
        pixels[row, :count] = _images(count, 16)
    return {"pixel_values": pixels}


# model, vision tokens of an image, the inputs for so many images in each row
FAMILIES = {
    "llava": (tiny_llava, 10, lambda rows: {"pixel_values": _images(sum(rows), 12)}),
    "qwen2_vl": (_qwen2_vl, 4, _qwen_images),
    "idefics3": (_idefics3, 4, _idefics_images),
    "gemma3": (_gemma3, 4, lambda rows: {"pixel_values": _images(sum(rows), 16)}),
}


def build(family):
    """A calibrated model whose u and v are far from 1 and 0, and a plain one with the same weights."""
    return _pair(FAMILIES[family][0])


def build_text(make=tiny_llama):
    """The same of a text model."""
    return _pair(make)


def build_kosmos2():
    """The same of a model that is told where its vision tokens are, and generates with an inner model."""
    return _pair(_kosmos2)


def _pair(make):
    torch.manual_seed(0)
    plain, calibrated = make().eval(), make().eval()
    calibrated.load_state_dict(plain.state_dict())
    inject_moca(calibrated)
    randomise(calibrated)
    return calibrated, plain


def randomise(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moca_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def lay_out(family, rows, pad="right", seed=0):
    """Inputs and vision mask of ``rows`` such as ``"ttIt"``: t is a text token, I all tokens of an image."""
    _, patches, images = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    spread = [row.replace("I", "v" * patches) for row in rows]
    length = max(map(len, spread))
    spread = [row.ljust(length, "_") if pad == "right" else row.rjust(length, "_") for row in spread]
    text = torch.randint(4, 60, (len(rows), length), generator=generator)

    def where(kind):
        return torch.tensor([[character == kind for character in row] for row in spread])

    mask = where("v")
    inputs = {
        "input_ids": text.masked_fill(mask, IMAGE_TOKEN).masked_fill(where("_"), 0),
        "attention_mask": (~where("_")).long(),
    }
    counts = [row.count("I") for row in rows]
    if any(counts):
        inputs |= images(counts)
    if family == "qwen2_vl":
        inputs["mm_token_type_ids"] = mask.long()
    return inputs, mask


@contextmanager
def reference(plain, calibrated, mask, cached=False):
    """Meanwhile ``plain`` applies u and v of ``calibrated`` after its layers, token by token.

    ``mask`` covers the prompt; rows may be repeated for beams, and positions after it are text. Every forward is
    taken to start at position 0, or with ``cached`` where the last one ended.
    """
    parameters = [p.detach() for p in moca_parameters(calibrated)]

    def apply(hidden, scale, shift, start):
        hidden = hidden.clone()
        repeats = hidden.shape[0] // mask.shape[0]
        for row in range(hidden.shape[0]):
            for index in range(hidden.shape[1]):
                position = start + index
                if position < mask.shape[1] and mask[row // repeats, position]:
                    hidden[row, index] = scale * hidden[row, index] + shift
        return hidden

    def hook(scale, shift):
        start = 0

        def after(module, args, output):
            nonlocal start
            hidden = output[0] if isinstance(output, tuple) else output
            result = apply(hidden, scale, shift, start)
            start += hidden.shape[1] if cached else 0
            return (result, *output[1:]) if isinstance(output, tuple) else result

        return after

    pairs = zip(parameters[::2], parameters[1::2], strict=True)
    handles = [
        layer.register_forward_hook(hook(*pair)) for layer, pair in zip(layers_of(plain), pairs, strict=True)
    ]
    try:
        yield plain
    finally:
        for handle in handles:
            handle.remove()


def layers_of(model):
    return next(m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
