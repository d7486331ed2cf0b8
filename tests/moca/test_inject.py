"""MoCa goes in without changing a bit, and comes out without a trace."""

import copy
import gc
import pickle
import weakref

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from mir_lightning.moca import MoCa, inject_moca, moca_parameters, moca_statistics, remove_moca
from mir_lightning.moca.layers import CalibratedLayer
from tests.moca.families import FAMILIES, build, lay_out, layers_of, randomise
from tests.models import tiny_llava

ROWS = ["tIttIt", "ttIt"]


def _trace(model):
    """Everything of a model but its weights' values."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
    )
    return {
        name: (type(m), sorted(vars(m)), sorted(m._modules), [len(getattr(m, hook)) for hook in hooks])
        for name, m in model.named_modules()
    }, model.config.to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_injected_model_is_bit_identical_and_removal_leaves_no_trace(family, dtype):
    plain = FAMILIES[family][0]().eval().to(dtype)
    inputs, _ = lay_out(family, ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    expected = plain(**inputs, output_hidden_states=True)
    before, keys = _trace(plain), list(plain.state_dict())
    inject_moca(plain)
    found = plain(**inputs, output_hidden_states=True)
    assert torch.equal(found.logits, expected.logits)
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    assert _trace(plain) != before
    randomise(plain)
    assert not torch.equal(plain(**inputs).logits, expected.logits)
    remove_moca(plain)
    assert _trace(plain) == before
    assert list(plain.state_dict()) == keys
    assert torch.equal(plain(**inputs).logits, expected.logits)


def test_gradients_of_an_injected_model_are_bit_identical():
    plain = tiny_llava()
    inputs, _ = lay_out("llava", ROWS)
    gradients = []
    for _ in range(2):
        plain.zero_grad()
        plain(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in plain.named_parameters() if ".moca." not in n})
        if not hasattr(plain.config, "moca"):
            inject_moca(plain)
    assert all(g is h is None or torch.equal(g, h) for g, h in zip(*(d.values() for d in gradients), strict=True))


def test_what_is_injected():
    model = tiny_llava().to(torch.bfloat16).requires_grad_(False)
    inject_moca(model)
    layers = layers_of(model)
    assert all(isinstance(layer, LlamaDecoderLayer) for layer in layers)
    assert {type(layer).__name__ for layer in layers} == {"LlamaDecoderLayer"}
    for layer in layers:
        assert isinstance(layer.moca, MoCa)
        assert torch.equal(layer.moca.scale, torch.ones(24))
        assert torch.equal(layer.moca.shift, torch.zeros(24))
    parameters = moca_parameters(model)
    assert sum(p.numel() for p in parameters) == 2 * 24 * 3
    assert all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [
        f"model.language_model.layers.{layer}.moca.{part}" for layer in range(3) for part in ("scale", "shift")
    ]


def test_noise_at_the_start():
    torch.manual_seed(0)
    model = tiny_llava(layers=40)
    inject_moca(model, init_std=0.1)
    parameters = torch.stack([p.detach() for p in moca_parameters(model)])
    for values, mean in ((parameters[::2], 1.0), (parameters[1::2], 0.0)):
        assert values.mean().item() == pytest.approx(mean, abs=0.02)
        assert values.std().item() == pytest.approx(0.1, abs=0.02)


def test_injected_into_what_holds_the_model():
    holder = torch.nn.ModuleDict({"vlm": tiny_llava()})
    inject_moca(holder)
    assert len(moca_parameters(holder)) == 6
    remove_moca(holder)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = tiny_llava()
    inject_moca(model)
    assert all(p.is_meta for p in moca_parameters(model))


def test_statistics_by_layer():
    model, _ = build("llava")
    with torch.no_grad():
        layers_of(model)[1].moca.scale.fill_(0.5)
        layers_of(model)[1].moca.shift[:] = torch.tensor([-2.0, 0.0]).repeat(12)
    found = moca_statistics(model)
    assert list(found) == [f"moca/{part}/layer_0{layer}" for layer in (1, 2, 3) for part in ("scale", "shift")]
    assert found["moca/scale/layer_02"] == 0.5
    assert found["moca/shift/layer_02"] == 1.0
    assert all(isinstance(value, float) for value in found.values())


def test_copies_are_models_of_their_own():
    model, _ = build("llava")
    inputs, _ = lay_out("llava", ROWS)
    expected = model(**inputs).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, expected)
    randomise(twin, seed=5)
    assert torch.equal(model(**inputs).logits, expected)
    assert not torch.equal(twin(**inputs).logits, expected)
    remove_moca(twin)
    assert torch.equal(model(**inputs).logits, expected)
    assert not any(isinstance(m, CalibratedLayer) for m in twin.modules())
    assert sum(len(m._forward_pre_hooks) for m in twin.modules()) == 0


def test_pickled():
    model, _ = build("llava")
    again = pickle.loads(pickle.dumps(model))
    inputs, _ = lay_out("llava", ROWS)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    remove_moca(again)


def test_the_model_is_freed():
    model, _ = build("llava")
    model(**lay_out("llava", ROWS)[0])
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


def test_errors():
    model = tiny_llava()
    for call in (remove_moca, moca_parameters, moca_statistics):
        with pytest.raises(ValueError, match=r"ForConditionalGeneration has no MoCa: call inject_moca\(model\)"):
            call(model)
    for init_std in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"init_std must be 0 or above, got"):
            inject_moca(model, init_std=init_std)
    with pytest.raises(ValueError, match="Linear holds no Hugging Face model"):
        inject_moca(torch.nn.Linear(2, 2))
    inject_moca(model)
    with pytest.raises(ValueError, match=r"has MoCa already: remove_moca\(model\) first"):
        inject_moca(model)


def test_wrapped_too_early():
    adapted = peft.get_peft_model(tiny_llava(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="model is wrapped in PeftModel, which would not train or save MoCa"):
        inject_moca(adapted)
    model = tiny_llava()
    layers = layers_of(model)
    layers[2] = torch.compile(layers[2])
    with pytest.raises(ValueError, match=r"is sharded, compiled or dispatched .* \(OptimizedModule\): inject"):
        inject_moca(model)
    assert not any(isinstance(m, CalibratedLayer) for m in model.modules())


def test_layers_with_a_forward_of_their_own():
    """accelerate replaces ``forward`` on the object: of a calibrated layer that is fine, before it is refused."""
    model, _ = build("llava")
    inputs, _ = lay_out("llava", ROWS)
    expected = model(**inputs).logits
    for layer in layers_of(model):
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert torch.equal(model(**inputs).logits, expected)
    dispatched = tiny_llava()
    add_hook_to_module(layers_of(dispatched)[1], AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(ValueError, match=r"or dispatched to a device already \(LlamaDecoderLayer\): inject MoCa"):
        inject_moca(dispatched)


def test_cross_attention_is_refused():
    text = MllamaTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=40,
        cross_attention_layers=[1],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = MllamaVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_global_layers=1,
        attention_heads=2,
        image_size=8,
        patch_size=4,
        intermediate_layers_indices=[0],
        vision_output_dim=32,
    )
    config = MllamaConfig(text_config=text, vision_config=vision)
    with pytest.raises(ValueError, match="sees images through cross-attention"):
        inject_moca(MllamaForConditionalGeneration(config))
