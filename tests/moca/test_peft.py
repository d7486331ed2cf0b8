"""MoCa beside LoRA, as one PEFT adapter."""

import peft
import pytest
import torch
from safetensors.torch import load_file

from mir_lightning.moca import (
    from_pretrained,
    inject_moca,
    load_moca,
    moca_parameters,
    moca_statistics,
    remove_moca,
    save_moca,
)
from tests.moca.families import lay_out, layers_of, reference
from tests.models import tiny_llava

ROWS = ["tIttIt", "ttIt"]


def _injected():
    model = tiny_llava().eval()
    inject_moca(model)
    return model


def _trained_adapter():
    """LoRA and MoCa far from their start, by some steps of training."""
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, modules_to_save=["moca"])
    model = peft.get_peft_model(_injected(), config)
    inputs, _ = lay_out("llava", ROWS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3.0)
    for _ in range(4):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), inputs


@pytest.fixture(scope="module")
def trained():
    return _trained_adapter()


def test_adapter_trains_and_can_be_disabled(trained):
    model, inputs = trained
    plain = tiny_llava().eval()(**inputs).logits
    found = model(**inputs).logits
    assert (found - plain).abs().max() > 0.01
    assert len(moca_parameters(model)) == 6
    assert all(p.requires_grad for p in moca_parameters(model))
    assert min(moca_statistics(model).values()) > 1e-4
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model(**inputs).logits, found)


def test_the_active_adapter_is_what_calibrates(trained):
    """Against the reference on a model with the merged LoRA weights and no MoCa."""
    model, inputs = _trained_adapter()
    found = model(**inputs).logits
    merged = model.merge_and_unload()
    plain = tiny_llava().eval()
    plain.load_state_dict({k: v for k, v in merged.state_dict().items() if ".moca." not in k})
    mask = inputs["input_ids"] == 3
    with reference(plain, merged, mask):
        torch.testing.assert_close(plain(**inputs).logits, found, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged(**inputs).logits, found, rtol=0, atol=1e-5)


def test_saved_and_loaded(trained, tmp_path):
    model, inputs = trained
    model.save_pretrained(tmp_path)
    assert sum(".moca." in key for key in load_file(tmp_path / "adapter_model.safetensors")) == 6
    again = peft.PeftModel.from_pretrained(_injected(), tmp_path).eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_merged_model_is_saved_whole(tmp_path):
    model, inputs = _trained_adapter()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path).eval()(**inputs).logits, merged(**inputs).logits)
    remove_moca(merged)


def test_alone_from_an_adapter(trained, tmp_path):
    model, _ = trained
    save_moca(model, tmp_path / "moca.safetensors")
    other = _injected()
    load_moca(other, tmp_path / "moca.safetensors")
    assert all(map(torch.equal, moca_parameters(other), moca_parameters(model)))


def test_removal_from_a_wrapped_model_is_refused(trained):
    model, _ = trained
    with pytest.raises(ValueError, match="was wrapped after MoCa was injected: merge or unload the PEFT adapter"):
        remove_moca(model)
    assert type(layers_of(model.get_base_model())[0].moca) is peft.utils.ModulesToSaveWrapper
