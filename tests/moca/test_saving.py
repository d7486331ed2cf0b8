"""MoCa in files: with the model, and alone."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from mir_lightning.moca import from_pretrained, inject_moca, load_moca, moca_parameters, remove_moca, save_moca
from tests.moca.families import FAMILIES, build, lay_out, layers_of, randomise
from tests.models import tiny_llava

ROWS = ["tIttIt", "ttIt"]


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model(tmp_path, family):
    model, _ = build(family)
    inputs, _ = lay_out(family, ROWS)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(from_pretrained(tmp_path / "again").eval()(**inputs).logits, model(**inputs).logits)


def test_whole_model_in_shards_and_half_precision(tmp_path):
    model, _ = build("llava")
    for name, parameter in model.named_parameters():
        if ".moca." not in name:
            parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = from_pretrained(tmp_path, model_class=LlavaForConditionalGeneration, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    for ours, theirs in zip(moca_parameters(again), moca_parameters(model), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_what_stock_loading_does(tmp_path, caplog):
    """It reports unexpected weights and gives the plain model."""
    model, plain = build("llava")
    model.save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    logger.removeHandler(caplog.handler)
    assert "UNEXPECTED" in caplog.text
    assert "moca.scale" in caplog.text
    inputs, _ = lay_out("llava", ROWS)
    assert torch.equal(stock(**inputs).logits, plain(**inputs).logits)


def test_whole_model_errors(tmp_path):
    model, _ = build("llava")
    remove_moca(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was saved without MoCa: load it with its own from_pretrained"):
        from_pretrained(tmp_path)
    model.config.moca = True
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"says that it holds MoCa, but model.language_model.layers.0.moca.scale"):
        from_pretrained(tmp_path)
    model.config.architectures = ["MyModel"]
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the config names 'MyModel', which is no class of transformers: give"):
        from_pretrained(tmp_path)


def test_alone(tmp_path):
    model, _ = build("llava")
    save_moca(model, tmp_path / "moca.safetensors")
    tensors = load_file(tmp_path / "moca.safetensors")
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        f"layers.{layer}.{part}": [24] for layer in range(3) for part in ("scale", "shift")
    }
    other, _ = build("llava")
    randomise(other, seed=5)
    load_moca(other, tmp_path / "moca.safetensors")
    inputs, _ = lay_out("llava", ROWS)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)


def test_files_that_do_not_fit(tmp_path):
    model, _ = build("llava")
    file = tmp_path / "moca.safetensors"
    save_moca(model, file)
    before = [p.clone() for p in moca_parameters(model)]
    deeper = tiny_llava(layers=4)
    with pytest.raises(ValueError, match=r"has no MoCa: call inject_moca\(model\) first"):
        save_moca(deeper, tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no MoCa: call inject_moca\(model\) first"):
        load_moca(deeper, file)
    inject_moca(deeper)
    with pytest.raises(ValueError, match="holds MoCa of 3 layers, and the model has 4"):
        load_moca(deeper, file)
    with pytest.raises(ValueError, match=r"file: there is no .*absent; save_moca writes one"):
        load_moca(model, tmp_path / "absent")
    tensors = load_file(file)
    save_file({**tensors, "layers.2.shift": torch.zeros(16)}, file)
    with pytest.raises(ValueError, match=r"MoCa of width \[16\] \(layers.2.shift\), and the model has \[24\]"):
        load_moca(model, file)
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="was not written by save_moca: it holds weight"):
        load_moca(model, file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_moca(model, file)
    assert all(map(torch.equal, moca_parameters(model), before))
    assert layers_of(model)[0].moca.scale is moca_parameters(model)[0]
