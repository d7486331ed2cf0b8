"""Tiny random models of many Hugging Face vision-language families, each with a batch of two samples."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

IMAGE = 3  # the image token
VOCABULARY = 128
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
IMAGE_ID = {"image_token_id": IMAGE}
IMAGE_INDEX = {"image_token_index": IMAGE}
OTHER_IDS = {"video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}


@dataclass
class Family:
    """Config arguments, image tokens an image, and what the forward takes besides token ids."""

    config: dict[str, Any]
    tokens: int
    inputs: dict[str, Any]  # a shape to fill at random, a tensor as it is, or "vision": where the image tokens are
    records: bool = True  # whether the model returns its hidden states
    covers_more: int = 0  # mask positions an image whose embeddings are learned, not seen


def _llava(**config: Any) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        **config,
    }


def _grid(side: int, width: int) -> dict[str, Any]:
    """Flattened patches of two images and their grids, as Qwen's processors make them."""
    return {
        "pixel_values": (2 * side * side, width),
        "image_grid_thw": torch.tensor([[1, side, side]] * 2),
        "mm_token_type_ids": "vision",
    }


_SIGLIP = {"model_type": "siglip_vision_model", **VISION}
_IMAGES = {"pixel_values": (2, 3, 16, 16)}

FAMILIES = {
    "llava": Family(_llava(**IMAGE_INDEX, vision_feature_layer=-1), 16, _IMAGES),
    "vipllava": Family(_llava(**IMAGE_INDEX, vision_feature_layers=[-1, 1]), 16, _IMAGES),
    "llava_next": Family(
        _llava(**IMAGE_INDEX, vision_feature_layer=-1, image_grid_pinpoints=[[16, 16]]),
        16 + 20,
        {"pixel_values": (2, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)},
        covers_more=4,
    ),
    "llava_onevision": Family(
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": _SIGLIP,
            **IMAGE_INDEX,
            "video_token_index": 4,
            "vision_feature_layer": -1,
            "image_grid_pinpoints": [[16, 16]],
        },
        16 + 20,
        {"pixel_values": (2, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)},
        covers_more=4,
    ),
    "video_llava": Family(
        _llava(
            **IMAGE_INDEX, video_token_index=4, vision_feature_layer=-1, vision_feature_select_strategy="default"
        ),
        16,
        {"pixel_values_images": (2, 3, 16, 16)},
    ),
    "qwen2_vl": Family(
        {
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
            **IMAGE_ID,
            **OTHER_IDS,
        },
        4,
        _grid(4, 96),
    ),
    "qwen2_5_vl": Family(
        {
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
            **IMAGE_ID,
            **OTHER_IDS,
        },
        4,
        _grid(4, 96),
    ),
    "qwen3_vl": Family(
        {
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            **IMAGE_ID,
            **OTHER_IDS,
        },
        4,
        _grid(4, 96),
    ),
    "qwen3_vl_moe": Family(
        {
            "text_config": {**TEXT, **MOE, "rope_parameters": MROPE},
            "vision_config": {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            **IMAGE_ID,
            **OTHER_IDS,
        },
        4,
        _grid(4, 96),
    ),
    "internvl": Family(
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
            **IMAGE_ID,
        },
        4,
        _IMAGES,
    ),
    "idefics2": Family(
        {
            "text_config": {"model_type": "mistral", **TEXT},
            "vision_config": VISION,
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 6,
                "resampler_depth": 2,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
            },
            **IMAGE_ID,
        },
        6,
        {"pixel_values": (2, 1, 3, 16, 16)},
    ),
    "idefics3": Family(
        {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, "scale_factor": 2, **IMAGE_ID},
        4,
        {"pixel_values": (2, 1, 3, 16, 16)},
    ),
    "smolvlm": Family(
        {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, "scale_factor": 2, **IMAGE_ID},
        4,
        {"pixel_values": (2, 1, 3, 16, 16)},
    ),
    "paligemma": Family(
        {
            "text_config": {"model_type": "gemma", **TEXT},
            "vision_config": {**_SIGLIP, "projection_dim": 32},
            "projection_dim": 32,
            **IMAGE_INDEX,
        },
        16,
        _IMAGES,
    ),
    "gemma3": Family(
        {
            "text_config": {
                **TEXT,
                "sliding_window": 8,
                "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
            },
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
            **IMAGE_INDEX,
        },
        4,
        _IMAGES,
    ),
    "mistral3": Family(
        {
            "text_config": {"model_type": "mistral", **TEXT},
            "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8},
            "vision_feature_layer": -1,
            **IMAGE_INDEX,
        },
        4,
        {**_IMAGES, "image_sizes": torch.tensor([[16, 16]] * 2)},
    ),
    "aya_vision": Family(
        {
            "text_config": {"model_type": "cohere2", **TEXT},
            "vision_config": _SIGLIP,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "downsample_factor": 2,
            **IMAGE_INDEX,
        },
        4,
        _IMAGES,
    ),
    "cohere2_vision": Family(
        {
            "text_config": {"model_type": "cohere2", **TEXT},
            "vision_config": _SIGLIP,
            "alignment_intermediate_size": 32,
            "downsample_factor": 2,
            **IMAGE_ID,
        },
        4,
        _IMAGES,
    ),
    "blip-2": Family(
        {
            "text_config": {
                "model_type": "opt",
                "hidden_size": 32,
                "word_embed_proj_dim": 32,
                "ffn_dim": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "vocab_size": VOCABULARY,
                "pad_token_id": 0,
            },
            "vision_config": VISION,
            "qformer_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "encoder_hidden_size": 16,
                "vocab_size": 8,
            },
            "num_query_tokens": 5,
            **IMAGE_INDEX,
        },
        5,
        _IMAGES,
        records=False,
    ),
    "kosmos-2": Family(
        {
            "text_config": {
                "embed_dim": 32,
                "ffn_dim": 48,
                "layers": 3,
                "attention_heads": 4,
                "vocab_size": VOCABULARY,
            },
            "vision_config": VISION,
            "latent_query_num": 5,
        },
        5,
        {**_IMAGES, "image_embeds_position_mask": "vision"},
    ),
    "llama4": Family(
        {
            "text_config": {
                **TEXT,
                **MOE,
                "intermediate_size_mlp": 32,
                "num_experts_per_tok": 1,
                "attention_chunk_size": 16,
            },
            "vision_config": {
                **VISION,
                "intermediate_size": 64,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            **IMAGE_INDEX,
        },
        4,
        _IMAGES,
    ),
    "chameleon": Family(
        {
            **TEXT,
            "num_key_value_heads": 4,
            "vq_config": {
                "embed_dim": 8,
                "latent_channels": 8,
                "num_embeddings": 32,
                "resolution": 16,
                "base_channels": 32,
                "channel_multiplier": [1, 2],
                "num_res_blocks": 1,
            },
            "vocabulary_map": {
                "<image>": IMAGE,
                **{f"IMGIMG{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 64 + i for i in range(32)},
            },
            **IMAGE_ID,
        },
        64,
        _IMAGES,
    ),
    "emu3": Family(
        {
            "text_config": TEXT,
            "vq_config": {
                "codebook_size": 32,
                "temporal_downsample_factor": 1,
                "base_channels": 32,
                "channel_multiplier": [1, 2],
                "hidden_size": 64,
                "attn_resolutions": [],
                "num_res_blocks": 1,
            },
            "vocabulary_map": {
                "<image>": IMAGE,
                "<|extra_200|>": 7,
                **{f"<|visual token {i:06d}|>": 64 + i for i in range(32)},
            },
            **IMAGE_ID,
        },
        72,
        {**_IMAGES, "image_sizes": torch.tensor([[16, 16]] * 2)},
    ),
    "glm4v": Family(
        {
            "text_config": {**TEXT, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
            "vision_config": {**QWEN_VISION, "image_size": 16},
            **IMAGE_ID,
            "image_start_token_id": 5,
            "image_end_token_id": 6,
            "video_start_token_id": 7,
            "video_end_token_id": 8,
            "video_token_id": 4,
        },
        4,
        _grid(4, 96),
    ),
    "got_ocr2": Family(
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {
                "hidden_size": 16,
                "mlp_dim": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 4,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
            **IMAGE_INDEX,
        },
        16,
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "aria": Family(
        {
            "text_config": {**TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
            "vision_config": {"model_type": "idefics3_vision", **VISION},
            "projector_patch_to_query_dict": {16: 4},
            **IMAGE_INDEX,
        },
        4,
        _IMAGES,
    ),
    "janus": Family(
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {**VISION, "mlp_ratio": 2, "projection_dim": 32, "num_image_tokens": 16},
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": 8,
                "image_token_embed_dim": 32,
                "num_patches": 4,
            },
            **IMAGE_ID,
        },
        16,
        _IMAGES,
    ),
    "ovis2": Family(
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {**VISION, "vocab_size": 24, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
            "hidden_size": 32,
            "vocab_size": VOCABULARY,
            **IMAGE_ID,
            "visual_indicator_token_ids": [10, 11, 12, 13, 14],
        },
        4,
        _IMAGES,
    ),
}


def build_family(name: str, vocab_size: int = VOCABULARY, **config_changes: Any) -> Any:
    """The tiny random model."""
    torch.manual_seed(0)
    arguments = {**FAMILIES[name].config, **config_changes}
    if "text_config" in arguments:
        arguments["text_config"] = {**arguments["text_config"], "vocab_size": vocab_size}
    config = CONFIG_MAPPING[name](**arguments)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for key, parameter in model.named_parameters():
        if "mm_input_projection" in key:  # Gemma 3's starts as zeros
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def family_batch(name: str, seed: int = 0) -> dict[str, Any]:
    """Two samples: three text tokens, an image, six text tokens (four and padding in the second)."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(20, 60, (2, 9 + family.tokens), generator=torch.Generator().manual_seed(0))
    input_ids[:, 3 : 3 + family.tokens] = IMAGE
    input_ids[1, -2:] = 0
    inputs = {
        key: torch.randn(value, generator=generator) if isinstance(value, tuple) else value
        for key, value in family.inputs.items()
    }
    inputs |= {key: (input_ids == IMAGE).long() for key, value in inputs.items() if isinstance(value, str)}
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long(), **inputs}
