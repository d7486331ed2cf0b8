import os
import pickle
import shutil
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mir_lightning import evaluate_mir
from mir_lightning.cli.models import base_of_adapter, load_model, load_processor
from mir_lightning.probing.pairs import PairProbe, read_pairs
from tests.models import tiny_llava
from tests.processors import save_qwen2_vl


@pytest.fixture
def qwen_folder(shared, tmp_path):
    return tmp_path, save_qwen2_vl(tmp_path, shared.root / "model")


def test_a_processor_with_a_video_part_serves_images_without_torchvision(qwen_folder, shared):
    folder, model = qwen_folder
    processor = load_processor(str(folder))
    pairs = read_pairs(shared.root / "images", shared.root / "texts", 3)
    probe = PairProbe(processor, model.config, pairs, 3)
    batch = probe[0]
    row = batch["input_ids"][1]
    said = processor.tokenizer.decode(row[batch["text_mask"][1]])
    assert said == "A short story.<|im_end|>\n"  # no <|vision_end|>
    again = pickle.loads(pickle.dumps(processor))  # as workers that are spawned get it
    assert PairProbe(again, model.config, pairs, 3).fingerprint == probe.fingerprint
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


PLAIN = Namespace(dtype="auto", device="cpu", device_map=None)
_OLD_NAMES = {
    "model.language_model.": "language_model.model.",  # of LLaVA before transformers 4.52
    "model.vision_tower.": "vision_tower.vision_model.",
}


def _old_name(name):
    for new, old in _OLD_NAMES.items():
        name = name.replace(f"base_model.model.{new}", f"base_model.model.{old}")
    return name


@pytest.fixture
def adapter(shared, tmp_path):
    """Save a LoRA adapter of other weights than none; gives its folder and the adapted model."""

    def save(saving=None, **config):
        torch.manual_seed(0)
        model = type(shared.model).from_pretrained(shared.root / "model")
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], **config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.peft_config["default"].base_model_name_or_path = str(shared.root / "model")
        model.save_pretrained(tmp_path / "adapter", **(saving or {}))
        return tmp_path / "adapter", model.eval()

    return save


def _same(one, other):
    """Whether two models give the same logits of all their tokens."""
    ids = torch.arange(10, 40)[None]
    return torch.equal(one(input_ids=ids).logits, other.to("cpu")(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("saving", "config"),
    [
        ({}, {}),
        ({"safe_serialization": False}, {}),
        ({"save_embedding_layers": True}, {}),
        ({}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ({"save_embedding_layers": True}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ({}, {"trainable_token_indices": [11, 12]}),
        ({"save_embedding_layers": False}, {"bias": "all"}),
    ],
)
def test_whatever_an_adapter_saves_is_loaded(adapter, saving, config):
    folder, adapted = adapter(saving, **config)
    with torch.no_grad():
        assert _same(load_model(str(folder), PLAIN), adapted)
        assert not _same(load_model(base_of_adapter(str(folder)), PLAIN), adapted)


def test_one_of_several_adapters(adapter, tmp_path):
    folder, adapted = adapter()
    adapted.add_adapter("second", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    with torch.no_grad():
        assert _same(load_model(str(folder), PLAIN), adapted)
        adapted.set_adapter("second")
        assert base_of_adapter(str(folder / "second"))
        assert _same(load_model(str(folder / "second"), PLAIN), adapted)


def _rewrite(folder, change, binary):
    file = folder / "adapter_model.safetensors"
    tensors = change(load_file(file))
    if binary:
        file.unlink()
        torch.save(tensors, file.with_suffix(".bin"))
    else:
        save_file(tensors, file)


@pytest.mark.parametrize("binary", [False, True])
def test_an_adapters_weights_are_those_of_the_model(adapter, binary):
    folder, adapted = adapter()
    _rewrite(folder, lambda tensors: {_old_name(name): value for name, value in tensors.items()}, False)
    with torch.no_grad():
        assert _same(load_model(str(folder), PLAIN), adapted)
    for change, message in (
        (lambda tensors: dict(sorted(tensors.items())[1:]), "adapter: weights are missing: base_model.model."),
        (lambda tensors: {f"x.{name}": value for name, value in tensors.items()}, "adapter: weights are missing"),
        (lambda tensors: tensors | {"x": torch.ones(1)}, "adapter: weights are unknown to the model: x"),
        (
            lambda tensors: {name: value[:1] if "lora_A" in name else value for name, value in tensors.items()},
            r"adapter cannot be loaded: .*size mismatch for base_model\.model\.\S+\.q_proj\.lora_A",
        ),
    ):
        shutil.rmtree(folder)
        _rewrite(adapter()[0], change, binary)
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_model(str(folder), PLAIN)


@pytest.mark.parametrize("content", ["[1]", '{"base_model_name_or_path": ["m"]}', "{}"])
def test_an_adapter_that_names_no_base(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json names no base model \(base_model_name_or_path\)"):
        base_of_adapter(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.ckpt cannot be loaded: .*Error\)"):
        load_model(str(tmp_path / "a.ckpt"), PLAIN)


def test_weights_of_another_shape_are_named(shared, tmp_path):
    shutil.copytree(shared.root / "model", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.0.self_attn.q_proj.weight"))
    save_file(tensors | {name: tensors[name][1:].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r": weights are of another shape: .*layers\.0\.self_attn\.q_proj\.weight"
    ):
        load_model(str(tmp_path), PLAIN)
    state = {f"vlm.{key}": value for key, value in shared.model.state_dict().items()}
    state["vlm.lm_head.weight"] = state["vlm.lm_head.weight"][1:]
    torch.save({"vlm_config": shared.model.config.to_dict(), "state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"(?s)a\.ckpt cannot be loaded: .*size mismatch for lm_head\.weight"):
        load_model(str(tmp_path / "a.ckpt"), PLAIN)


@pytest.mark.parametrize(
    "name", ["config.json", "adapter_config.json", "model.safetensors", "processor_config.json"]
)
def test_a_pipe_in_a_models_folder_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for load in (lambda place: load_model(place, PLAIN), load_processor):
        with pytest.raises(ValueError, match=f"{name} must be a regular file"):
            load(str(tmp_path))


@pytest.mark.parametrize(
    "arguments", [["eval", "a.ckpt"], ["eval", "m", "--probe", "a.ckpt"], ["compare", "a.json"]]
)
def test_a_pipe_on_the_command_line_is_not_waited_for(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("a.ckpt")
    os.mkfifo("a.json")
    done = run(*arguments, "--no-progress", pairs=arguments[-1] == "a.ckpt" and len(arguments) == 2)
    assert (done.status, "must be a regular file" in done.err) == (1, True)
