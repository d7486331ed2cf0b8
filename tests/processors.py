"""Tiny random vision-language models of several families, each with a processor."""

import json
from functools import cache

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.families import build_family

_TEXT = """What colour is the star? Answer: red green blue yellow purple black. The star is red. The cross is
green. How many circles are there? one two three four. Question: Short answer: Is the square small or large?
Is it to the left of, to the right of, above or below the triangle? A photo of two small red circles. Picture:"""


@cache
def tokenizer(*special):
    """Byte-level BPE trained on a few lines; ``special`` tokens are never split or merged."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([_TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _text_options(layers=3):
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 400,
        "pad_token_id": 0,
    }


def _vision_options(size=16, patch=8):
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": patch,
    }


def llava(**text_options):
    """An image is 4 patches and CLS."""
    tokens = tokenizer("<image>")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_vision_options()),
        text_config=transformers.LlamaConfig(**_text_options(), **text_options),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    pixels = transformers.CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    processor = transformers.LlavaProcessor(
        pixels, tokens, patch_size=8, vision_feature_select_strategy="full", num_additional_image_tokens=1
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def _qwen(config_class, model_class, processor_class, vision_class, vision):
    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokens = tokenizer(*special)
    image, video, start, end = (tokens.convert_tokens_to_ids(t) for t in special)
    config = config_class(
        text_config={**_text_options(), "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        bos_token_id=1,
        eos_token_id=2,
        vision_config=vision_class(**vision),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    pixels = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 16 * 24}
    )
    # Without torchvision there is no video processor, and none to check its class against.
    checked = {"check_argument_for_proper_class": lambda self, name, argument: type(argument)}
    return model_class(config), type(processor_class.__name__, (processor_class,), checked)(pixels, tokens)


def qwen2_vl():
    """Images of different sizes have different numbers of tokens; positions have three dimensions."""
    return _qwen(
        transformers.Qwen2VLConfig,
        transformers.Qwen2VLForConditionalGeneration,
        transformers.Qwen2VLProcessor,
        transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig,
        {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
    )


def qwen2_5_vl():
    return _qwen(
        transformers.Qwen2_5_VLConfig,
        transformers.Qwen2_5_VLForConditionalGeneration,
        transformers.Qwen2_5_VLProcessor,
        transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig,
        {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    )


def gemma3():
    """Sliding windows of 8 tokens in two layers of three; image tokens see each other both ways."""
    special = ("<soft>", "<boi>", "<eoi>")
    tokens = tokenizer(*special)
    ids = [tokens.convert_tokens_to_ids(token) for token in special]
    tokens.image_token, tokens.boi_token, tokens.eoi_token = special
    tokens.image_token_id, tokens.boi_token_id, tokens.eoi_token_id = ids
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(
            **_text_options(),
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        vision_config=transformers.SiglipVisionConfig(**_vision_options()),
        mm_tokens_per_image=4,
        image_token_index=ids[0],
        boi_token_index=ids[1],
        eoi_token_index=ids[2],
    )
    pixels = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = transformers.Gemma3Processor(pixels, tokens, image_seq_length=4)
    return transformers.Gemma3ForConditionalGeneration(config), processor


def idefics3():
    """Images are cut into tiles, with row and column marks."""
    tokens = tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**_text_options()),
        vision_config={**_vision_options(size=16, patch=4)},
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    pixels = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=True
    )
    processor = transformers.Idefics3Processor(pixels, tokens, image_seq_len=4)
    return transformers.Idefics3ForConditionalGeneration(config), processor


def paligemma():
    """A prefix language model: the prompt's tokens see each other both ways, the answer's only what precedes."""
    tokens = tokenizer("<image>")
    pixels = transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    pixels.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(pixels, tokens)
    text = {**_text_options(), "vocab_size": len(tokens), "head_dim": 8}
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**text),
        vision_config=transformers.SiglipVisionConfig(**_vision_options(), projection_dim=32),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        projection_dim=32,
    )
    tokenizer.cache_clear()  # the processor has added tokens to it
    return transformers.PaliGemmaForConditionalGeneration(config), processor


FAMILIES = {f.__name__: f for f in (llava, qwen2_vl, qwen2_5_vl, gemma3, idefics3)}


def build(name, seed=0, **options):
    """``(model, processor)`` with logits far enough apart to tell candidates from each other."""
    torch.manual_seed(seed)
    model, processor = {**FAMILIES, "paligemma": paligemma}[name](**options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval(), processor


_QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
)


def save_qwen2_vl(folder, tokens_of):
    """A tiny Qwen2-VL as one with torchvision writes it, with the tokenizer of another folder; gives the model."""
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokens = transformers.AutoTokenizer.from_pretrained(tokens_of)
    tokens.add_special_tokens({"additional_special_tokens": marks})
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, tokens.convert_tokens_to_ids(marks), strict=True))
    model = build_family("qwen2_vl", **ids, vocab_size=len(tokens))
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    pixels = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}
    transformers.Qwen2VLImageProcessorPil(**pixels).save_pretrained(folder)
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", **pixels}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))
    (folder / "chat_template.jinja").write_text(_QWEN_TEMPLATE)
    return model
