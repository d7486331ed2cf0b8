import json
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from transformers import Qwen2VLImageProcessorPil

from mir_lightning import evaluate_mir
from mir_lightning.cli.models import load_model, load_processor
from mir_lightning.probing.pairs import PairProbe, read_pairs
from tests.families import build_family
from tests.models import tiny_llava

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
)
_MARKS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


@pytest.fixture
def qwen_folder(shared, tmp_path):
    """A Qwen2-VL folder as one with torchvision writes it."""
    tokenizer = type(shared.processor.tokenizer).from_pretrained(shared.root / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": _MARKS})
    image, video, start, end = (tokenizer.get_vocab()[mark] for mark in _MARKS)
    model = build_family(
        "qwen2_vl",
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        vocab_size=len(tokenizer),
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024).save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))
    (tmp_path / "chat_template.jinja").write_text(_TEMPLATE)
    return tmp_path, model


def test_a_processor_with_a_video_part_serves_images_without_torchvision(qwen_folder, shared):
    folder, model = qwen_folder
    processor = load_processor(str(folder))
    pairs = read_pairs(shared.root / "images", shared.root / "texts", 3)
    probe = PairProbe(processor, model.config, pairs, 3)
    batch = probe[0]
    row = batch["input_ids"][1]
    said = processor.tokenizer.decode(row[batch["text_mask"][1]])
    assert said == "A short story.<|im_end|>\n"  # no <|vision_end|>
    result = evaluate_mir(model, probe, check=True)
    assert result.vision_tokens == int((batch["input_ids"] == model.config.image_token_id).sum())
    assert result.checked


@pytest.mark.parametrize(
    ("limit", "dtype", "expected"),
    [("AVX2", "auto", torch.float32), ("AVX2", "bfloat16", torch.bfloat16), (None, "float16", torch.float16)],
)
def test_weights_a_cpu_would_emulate_are_loaded_in_float32(shared, tmp_path, monkeypatch, limit, dtype, expected):
    model = tiny_llava().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit or "ALL")
    options = Namespace(dtype=dtype, device="cpu", device_map=None)
    with (
        pytest.warns(UserWarning, match="--dtype bfloat16: .* --dtype float32 is faster")
        if dtype == "bfloat16"
        else (nullcontext())
    ):
        loaded = load_model(str(tmp_path), options)
    assert loaded.dtype == expected
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).to(expected)), name
