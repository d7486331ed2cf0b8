"""Hidden states, logits and gradients against the slow reference, for every layout of images and padding."""

import threading

import pytest
import torch

from mir_lightning import Probe, evaluate_mir
from mir_lightning.moca import moca_parameters, vision_mask
from tests.moca.families import FAMILIES, build, build_text, lay_out, layers_of, reference, tiny_falcon, tiny_llama

LAYOUTS = {
    "one image": ["ttItttt", "tIttttt"],
    "several images": ["tIttIt", "ItIt"],
    "image last": ["ttttI", "tIttttI"],
    "no image in one sample": ["tItttttt", "tttttttt"],
    "no image at all": ["tttttttt", "ttttt"],
}


def _captured(model, inputs):
    states = []
    handles = [
        layer.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers_of(model)
    ]
    output = model(**inputs, use_cache=False, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return [output.logits, *output.hidden_states, *states]


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward(family, layout, pad):
    calibrated, plain = build(family)
    inputs, mask = lay_out(family, LAYOUTS[layout], pad)
    with reference(plain, calibrated, mask):
        expected = _captured(plain, inputs)
    found = _captured(calibrated, inputs)
    assert len(found) == len(expected) == 1 + 4 + 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    if mask.any():
        assert (found[0] - plain(**inputs).logits).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family):
    calibrated, plain = build(family)
    inputs, mask = lay_out(family, LAYOUTS["several images"])
    inputs["labels"] = torch.where(mask, -100, inputs["input_ids"])
    calibrated(**inputs).loss.backward()
    with reference(plain, calibrated, mask):
        plain(**inputs).loss.backward()
    theirs = dict(plain.named_parameters())
    for name, ours in calibrated.named_parameters():
        if ".moca." not in name and theirs[name].grad is not None:
            torch.testing.assert_close(ours.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)
    for parameter in moca_parameters(calibrated)[:-2]:
        assert parameter.grad.abs().max() > 0


def test_gradients_of_scale_and_shift():
    """Against finite differences of the loss, in float32."""
    calibrated, _ = build("llava")
    inputs, mask = lay_out("llava", LAYOUTS["several images"])
    inputs["labels"] = torch.where(mask, -100, inputs["input_ids"])
    calibrated(**inputs).loss.backward()
    for parameter in moca_parameters(calibrated)[:4]:
        direction = torch.randn_like(parameter)
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                parameter.add_(step * direction)
                losses.append(calibrated(**inputs).loss.item())
                parameter.sub_(step * direction)
        slope = (losses[0] - losses[1]) / 2e-2
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=0.02, abs=2e-4)


@torch.no_grad()
def test_packed_sequences():
    """Two documents in one row give what each gives alone."""
    calibrated, plain = build("llava")
    calibrated.set_attn_implementation("eager")
    alone = [lay_out("llava", [row], seed=seed) for seed, row in enumerate(["tIttt", "ttItIt"])]
    lengths = [mask.shape[1] for _, mask in alone]
    packed = calibrated(
        input_ids=torch.cat([inputs["input_ids"] for inputs, _ in alone], dim=1),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        pixel_values=torch.cat([inputs["pixel_values"] for inputs, _ in alone]),
        use_cache=False,
    ).logits.split(lengths, dim=1)
    for logits, (inputs, mask) in zip(packed, alone, strict=True):
        with reference(plain, calibrated, mask):
            torch.testing.assert_close(logits, plain(**inputs, use_cache=False).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_video_and_image_in_one_sample():
    calibrated, plain = build("qwen2_vl")
    inputs, mask = lay_out("qwen2_vl", ["tIttItt"])
    video = torch.zeros_like(mask)
    video[:, 7:11] = True  # the second image is a video instead
    assert mask[video].all()
    inputs["input_ids"][video] = calibrated.config.video_token_id
    inputs["mm_token_type_ids"][video] = 2
    patches, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    inputs |= {"pixel_values": patches[:16], "image_grid_thw": grid[:1]}
    inputs |= {"pixel_values_videos": patches[16:], "video_grid_thw": grid[1:]}
    with reference(plain, calibrated, mask):
        expected = plain(**inputs).logits
    torch.testing.assert_close(calibrated(**inputs).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_positional_input_ids():
    calibrated, plain = build("llava")
    inputs, mask = lay_out("llava", ["tIt"])
    with reference(plain, calibrated, mask):
        expected = plain(inputs["input_ids"], inputs["pixel_values"]).logits
    torch.testing.assert_close(calibrated(inputs["input_ids"], inputs["pixel_values"]).logits, expected)


@torch.no_grad()
def test_the_inner_model_alone():
    calibrated, plain = build("llava")
    inputs, mask = lay_out("llava", ["tIttIt"])
    with reference(plain, calibrated, mask):
        expected = plain.model(**inputs).last_hidden_state
    torch.testing.assert_close(calibrated.model(**inputs).last_hidden_state, expected)


def test_mir_is_measured_on_calibrated_states():
    calibrated, plain = build("llava")
    inputs, mask = lay_out("llava", LAYOUTS["several images"])
    with reference(plain, calibrated, mask):
        expected = evaluate_mir(plain, Probe([inputs]))
    found = evaluate_mir(calibrated, Probe([inputs]))
    torch.testing.assert_close(found.layers, expected.layers, rtol=1e-5, atol=0)
    assert abs(found.mir - evaluate_mir(plain, Probe([inputs])).mir) > 0.1


@pytest.mark.parametrize("make", [tiny_llama, tiny_falcon])
@torch.no_grad()
def test_text_model_driven_by_an_explicit_mask(make):
    calibrated, plain = build_text(make)
    embeds, mask = torch.randn(2, 9, 24), torch.rand(2, 9) < 0.5
    with reference(plain, calibrated, mask):
        expected = plain(inputs_embeds=embeds).logits
    with vision_mask(mask):
        torch.testing.assert_close(calibrated(inputs_embeds=embeds).logits, expected)
        inner = calibrated.base_model(inputs_embeds=embeds).last_hidden_state
        torch.testing.assert_close(calibrated.lm_head(inner), expected)
    assert (expected - plain(inputs_embeds=embeds).logits).abs().max() > 0.1


@torch.no_grad()
def test_an_explicit_mask_wins():
    calibrated, plain = build("llava")
    inputs, mask = lay_out("llava", ["tIttIt"])
    chosen = torch.rand(mask.shape) < 0.5
    with reference(plain, calibrated, chosen):
        expected = plain(**inputs).logits
    with vision_mask(mask), vision_mask(chosen):
        torch.testing.assert_close(calibrated(**inputs).logits, expected)


def test_no_mask_is_an_error():
    calibrated, _ = build_text()
    for inputs in ({"inputs_embeds": torch.randn(1, 4, 24)}, {"input_ids": torch.ones(1, 4, dtype=torch.long)}):
        with pytest.raises(ValueError, match="no vision mask is known: call the model with input_ids, or give"):
            calibrated(**inputs)
    vlm, _ = build("llava")
    with pytest.raises(ValueError, match="no vision mask is known"):
        vlm(inputs_embeds=torch.randn(1, 4, 24))
    with pytest.raises(ValueError, match="no vision mask is known"):
        layers_of(vlm)[0](torch.randn(1, 4, 24))
    with pytest.raises(ValueError, match="no vision mask is known"):
        layers_of(vlm)[0].forward(torch.randn(1, 4, 24))


def test_another_models_mask_is_not_taken():
    """A text model run inside a vision-language model's forward, on as many positions."""
    outer, _ = build("llava")
    inner, _ = build_text()
    inputs, mask = lay_out("llava", ["tIt"])
    embeds = torch.randn(*mask.shape, 24)
    layers_of(outer)[0].register_forward_hook(lambda *_: inner.model.layers[0](embeds))
    with pytest.raises(ValueError, match="no vision mask is known"):
        outer(**inputs)


def test_an_explicit_mask_that_does_not_fit():
    calibrated, _ = build_text()
    embeds = torch.randn(2, 9, 24)
    for shape in ((2, 8), (2, 10), (1, 9)):
        with (
            vision_mask(torch.ones(shape, dtype=torch.bool)),
            pytest.raises(ValueError, match=r"the vision mask \[\d, \d+\] .* fit a forward of 2 rows and 9"),
        ):
            calibrated(inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"mask must be a boolean tensor \[B, S\], got torch.int64 \[2, 9\]"):
        vision_mask(torch.ones(2, 9, dtype=torch.long)).__enter__()
    with pytest.raises(ValueError, match="MoCa of width 24 got hidden states"), vision_mask(torch.ones(2, 8) > 0):
        layers_of(calibrated)[0].moca(embeds, torch.ones(2, 8) > 0)


def test_an_error_in_the_forward_leaves_nothing_behind():
    calibrated, _ = build("llava")
    inputs, _ = lay_out("llava", ["tIt"])
    handle = layers_of(calibrated)[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrated(**inputs)
    handle.remove()
    with pytest.raises(ValueError, match="no vision mask is known"):
        layers_of(calibrated)[0](torch.randn(1, 12, 24))


@torch.no_grad()
def test_two_models_interleaved_and_nested():
    """In the middle of a forward, another model and the same model run on other inputs."""
    outer, _ = build("llava")
    other, _ = build("qwen2_vl")
    inputs, _ = lay_out("llava", ["tIttIt"])
    inner_inputs, _ = lay_out("llava", ["ttIttt", "tIt"])
    other_inputs, _ = lay_out("qwen2_vl", ["tIttIt"])
    expected = [model(**i).logits for model, i in ((outer, inputs), (outer, inner_inputs), (other, other_inputs))]
    nested = []

    def between(module, args, output):
        handle.remove()
        nested.extend([outer(**inner_inputs).logits, other(**other_inputs).logits])

    handle = layers_of(outer)[0].register_forward_hook(between)
    found = outer(**inputs).logits
    for ours, theirs in zip([found, *nested], expected, strict=True):
        assert torch.equal(ours, theirs)


def test_threads():
    """Forwards of one model in two threads, made to alternate layer by layer."""
    calibrated, _ = build("llava")
    batches = [lay_out("llava", [row])[0] for row in ("tIttttIt", "ttIttItt")]
    with torch.no_grad():
        expected = [calibrated(**inputs).logits for inputs in batches]
    barrier = threading.Barrier(2, timeout=30)

    def wait(module, args):
        barrier.wait()

    for layer in layers_of(calibrated):
        layer.register_forward_pre_hook(wait)
    found = {}

    def work(index):
        with torch.no_grad():
            found[index] = calibrated(**batches[index]).logits

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(2))
