"""Gradient checkpointing, autocast and compilation give what the same model gives without them."""

import threading

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from mir_lightning.moca import MoCa, inject_moca, moca_parameters, remove_moca, vision_mask
from tests.moca.families import FAMILIES, build, build_text, lay_out, layers_of, reference

ROWS = (["tIttIt"], ["ItttIt"], ["ttIttI"])


def _batches(family="llava"):
    batches = []
    for seed, rows in enumerate(ROWS):
        inputs, mask = lay_out(family, rows, seed=seed)
        batches.append({**inputs, "labels": torch.where(mask, -100, inputs["input_ids"])})
    return batches


def _gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert sum(".moca." in name for name in found) == 6
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family, use_reentrant):
    """Several forwards before the first backward: each is recomputed with the mask it had."""
    model, _ = build(family)
    model.train()
    expected = []
    for batch in _batches(family):
        model(**batch, use_cache=False).loss.backward()
        expected.append(_gradients(model))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert layers_of(model)[0].gradient_checkpointing
    losses = [model(**batch, use_cache=False).loss for batch in _batches(family)]
    for loss, gradients in zip(losses, expected, strict=True):
        loss.backward()
        _assert_equal(_gradients(model), gradients)


def test_layers_are_recomputed():
    model, _ = build("llava")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    layers_of(model)[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    loss = model(**_batches()[0], use_cache=False).loss
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


def test_recomputation_in_another_thread():
    """As on a GPU, where autograd has a thread of its own."""
    model, _ = build("llava")
    model.train()
    batch = _batches()[0]
    model(**batch, use_cache=False).loss.backward()
    expected = _gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch, use_cache=False).loss
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    _assert_equal(_gradients(model), expected)


def test_checkpointing_with_an_explicit_mask():
    model, _ = build_text()
    model.train()
    embeds, mask, labels = torch.randn(2, 9, 24), torch.rand(2, 9) < 0.5, torch.randint(4, 60, (2, 9))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with vision_mask(mask):
            loss = model(inputs_embeds=embeds, labels=labels, use_cache=False).loss
        with vision_mask(~mask):
            loss.backward()
        results.append(_gradients(model))
    _assert_equal(*results)


def test_a_foreign_wrapper_that_recomputes_layers_is_told():
    model, _ = build("llava")
    layers = layers_of(model)
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    loss = model(**_batches()[0], use_cache=False).loss
    with pytest.raises(ValueError, match=r"use the model's gradient_checkpointing_enable\(\)"):
        loss.backward()


def test_a_batch_without_images_trains_nothing_but_has_gradients():
    """DDP waits for every parameter's gradient."""
    model, _ = build("llava")
    inputs, _ = lay_out("llava", ["ttttt"])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for parameter in moca_parameters(model):
        assert torch.equal(parameter.grad, torch.zeros(24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_module(dtype):
    """Only vision positions enter the sums: against the gradient by hand, in float64."""
    moca = MoCa(5, init_std=0.5)
    hidden = torch.randn(2, 4, 5, dtype=dtype, requires_grad=True)
    mask, weight = torch.rand(2, 4) < 0.5, torch.randn(2, 4, 5).to(dtype)
    (moca(hidden, mask) * weight).sum().backward()
    exact = (weight.double() * hidden.detach().double())[mask].sum(0)
    torch.testing.assert_close(moca.scale.grad.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moca.shift.grad.double(), weight.double()[mask].sum(0), rtol=1e-5, atol=1e-5)
    of_hidden = torch.where(mask[..., None], weight.double() * moca.scale.detach().double(), weight.double())
    torch.testing.assert_close(hidden.grad, of_hidden.to(dtype))


def test_arithmetic_is_float32_in_half_precision():
    """u * h + v = 1.002 + 0.0025 rounds up to the next bfloat16; u alone is 1 in bfloat16."""
    moca = MoCa(1)
    torch.nn.init.constant_(moca.scale, 1.002)
    torch.nn.init.constant_(moca.shift, 0.0025)
    hidden = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = moca(hidden, torch.ones(1, 1, dtype=torch.bool))
        assert found.dtype == torch.bfloat16
        assert found.item() == 1.0078125
    assert (hidden * moca.scale.bfloat16() + moca.shift.bfloat16()).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision_models(dtype):
    """Against the reference in the same precision; MoCa's own parameters stay float32."""
    calibrated, plain = build("llava")
    for model in (calibrated, plain):
        for name, parameter in model.named_parameters():
            if ".moca." not in name:
                parameter.data = parameter.data.to(dtype)
    inputs, mask = lay_out("llava", ["tIttIt", "ttItt"])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)

    def run(model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            return model(**inputs, output_hidden_states=True)

    with reference(plain, calibrated, mask):
        expected = run(plain)
    found = run(calibrated)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_compiled_model():
    """One compiled model on several masks, with gradients."""
    torch._dynamo.reset()
    model, _ = build("llava")
    compiled = torch.compile(model, backend="aot_eager")
    for batch in _batches():
        expected = model(**batch)
        expected.loss.backward()
        gradients = _gradients(model)
        found = compiled(**batch)
        found.loss.backward()
        torch.testing.assert_close(found.logits, expected.logits)
        for name, gradient in _gradients(model).items():
            torch.testing.assert_close(gradient, gradients[name])


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("way", ["layers in place", "layers wrapped", "language model"])
def test_compiled_parts(way, gradients):
    """Inputs of one shape: with the image here, there, nowhere."""
    torch._dynamo.reset()
    model, _ = build("llava")
    batches = [lay_out("llava", [row])[0] for row in ("tIttt", "t" * 14, "tttIt", "t" * 14)]
    with torch.set_grad_enabled(gradients):
        expected = [model(**batch).logits for batch in batches]
        layers = layers_of(model)
        for index, layer in enumerate(layers):
            if way == "layers in place":
                layer.compile(backend="eager")
            elif way == "layers wrapped":
                layers[index] = torch.compile(layer, backend="eager")
        if way == "language model":
            model.model.language_model.compile(backend="eager")
        for batch, logits in zip(batches, expected, strict=True):
            assert torch.equal(model(**batch).logits, logits)
    assert len(moca_parameters(model)) == 6


@pytest.mark.parametrize("compiled_layers", [False, True])
@torch.no_grad()
def test_injected_into_and_removed_from_a_warm_compiled_model(compiled_layers):
    torch._dynamo.reset()
    calibrated, plain = build_text()
    if compiled_layers:
        model = plain
        for layer in layers_of(plain):
            layer.compile(backend="eager")
    else:
        model = torch.compile(plain, backend="eager")
    embeds, mask = torch.randn(2, 9, 24), torch.rand(2, 9) < 0.5
    before = model(inputs_embeds=embeds).logits
    inject_moca(plain)
    plain.load_state_dict(calibrated.state_dict())
    with vision_mask(mask):
        assert torch.equal(model(inputs_embeds=embeds).logits, calibrated(inputs_embeds=embeds).logits)
    remove_moca(plain)
    assert torch.equal(model(inputs_embeds=embeds).logits, before)


@torch.no_grad()
def test_compiled_model_with_explicit_masks_in_one_graph():
    torch._dynamo.reset()
    model, _ = build_text()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    embeds = torch.randn(2, 9, 24)
    for _ in range(3):
        with vision_mask(torch.rand(2, 9) < 0.5):
            assert torch.equal(compiled(inputs_embeds=embeds).logits, model(inputs_embeds=embeds).logits)
    with pytest.raises(ValueError, match="no vision mask is known"):
        torch.compile(model, backend="eager")(inputs_embeds=embeds)
