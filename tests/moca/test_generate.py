"""Generation with caches against the slow reference, which runs every step on the whole sequence without one."""

import pytest
import torch

from mir_lightning.moca import vision_mask
from tests.moca.families import (
    FAMILIES,
    build,
    build_kosmos2,
    build_text,
    lay_out,
    layers_of,
    randomise,
    reference,
)

ROWS = ["tIttIt", "ttItt"]
STEPS = 6
GREEDY = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}


def _steps(model, inputs, **options):
    output = model.generate(**inputs, **{**GREEDY, **options}, return_dict_in_generate=True, output_logits=True)
    return output.sequences, torch.stack(output.logits)


def _assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_greedy(family, cache):
    calibrated, plain = build(family)
    inputs, mask = lay_out(family, ROWS, pad="left")
    with reference(plain, calibrated, mask):
        expected = _steps(plain, inputs, use_cache=False)
    found = _steps(calibrated, inputs, cache_implementation=cache)
    _assert_same(found, expected)
    assert not torch.equal(plain.generate(**inputs, **GREEDY), found[0])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_beam_search(family):
    calibrated, plain = build(family)
    inputs, mask = lay_out(family, ROWS, pad="left")
    with reference(plain, calibrated, mask):
        expected = _steps(plain, inputs, use_cache=False, num_beams=3)
    _assert_same(_steps(calibrated, inputs, num_beams=3), expected)


@pytest.mark.parametrize("num_beams", [1, 3])
@torch.no_grad()
def test_quantised_cache(num_beams):
    """A cache in 8-bit floating point changes the logits, so the reference has the same cache."""
    calibrated, plain = build("llava")
    inputs, mask = lay_out("llava", ROWS, pad="left")
    options = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "fp8"},
        "num_beams": num_beams,
    }
    with reference(plain, calibrated, mask, cached=True):
        expected = _steps(plain, inputs, **options)
    found = _steps(calibrated, inputs, **options)
    _assert_same(found, expected)
    assert not torch.equal(found[1], _steps(calibrated, inputs, num_beams=num_beams)[1])


def _lengths_of_forwards(model):
    lengths = []
    layers_of(model)[0].register_forward_hook(lambda m, a, out: lengths.append(a[0].shape[1]))
    return lengths


@torch.no_grad()
def test_chunked_prefill():
    """Chunks that end in the middle of an image; transformers asks for images encoded beforehand."""
    calibrated, plain = build("llava")
    inputs, mask = lay_out("llava", ["tIttIt"])
    with reference(plain, calibrated, mask):
        expected = _steps(plain, inputs, use_cache=False)
    pixels = inputs.pop("pixel_values")
    inputs["mm_encoder_outputs"] = {"image": calibrated.get_image_features(pixels, return_dict=True)}
    lengths = _lengths_of_forwards(calibrated)
    _assert_same(_steps(calibrated, inputs, prefill_chunk_size=5), expected)
    assert lengths == [5, 5, 5, 5, 4] + [1] * (STEPS - 1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_assisted_decoding(family):
    """Candidates looked up in the prompt: several tokens in one cached step."""
    calibrated, plain = build(family)
    inputs, mask = lay_out(family, ["t" * 57 + "ItIt"])
    inputs["input_ids"][~mask] = torch.arange(59) % 57 + 4  # the whole vocabulary first, so that look-ups hit
    with reference(plain, calibrated, mask):
        expected = _steps(plain, inputs, use_cache=False)
    lengths = _lengths_of_forwards(calibrated)
    _assert_same(_steps(calibrated, inputs, prompt_lookup_num_tokens=3, max_matching_ngram_size=1), expected)
    assert any(length > 1 for length in lengths[1:])


@torch.no_grad()
def test_assisted_by_another_calibrated_model():
    calibrated, plain = build("llava")
    assistant, _ = build("llava")
    randomise(assistant, seed=9)
    inputs, mask = lay_out("llava", ["tIttIt"])
    with reference(plain, calibrated, mask):
        expected = _steps(plain, inputs, use_cache=False)
    lengths = _lengths_of_forwards(calibrated)
    _assert_same(_steps(calibrated, inputs, assistant_model=assistant), expected)
    assert any(length > 1 for length in lengths[1:])


@torch.no_grad()
def test_a_conversation_continued_from_its_cache():
    """The second turn brings an image of its own; the first stays in the cache."""
    calibrated, plain = build("llava")
    inputs, mask = lay_out("llava", ["tIttttIttt"])
    first, second = inputs["pixel_values"].split(1)
    with reference(plain, calibrated, mask):
        expected = plain(**inputs, use_cache=False).logits
        expected_steps = _steps(plain, inputs, use_cache=False)
    pieces, images = [11, 2, 12, 3], [{"pixel_values": first}, {}, {"pixel_values": second}, {}]
    cache, logits = None, []
    for ids, image in zip(inputs["input_ids"].split(pieces, dim=1), images, strict=True):
        output = calibrated(input_ids=ids, past_key_values=cache, **image)
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-5)
    cache = calibrated(input_ids=inputs["input_ids"][:, :13], pixel_values=first).past_key_values
    found = _steps(calibrated, {**inputs, "pixel_values": second}, past_key_values=cache)
    _assert_same(found, expected_steps)


@torch.no_grad()
def test_a_model_that_is_told_the_positions():
    """kosmos-2 has no placeholder token; without an image in the call there is no vision token."""
    calibrated, plain = build_kosmos2()
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[:, 2:6] = True
    inputs = {
        "input_ids": torch.randint(4, 60, (2, 11)),
        "attention_mask": torch.ones(2, 11, dtype=torch.long),
        "pixel_values": torch.randn(2, 3, 8, 8),
        "image_embeds_position_mask": mask.long(),
    }
    with reference(plain, calibrated, mask):
        expected = plain(**inputs).logits
        expected_ids = plain.generate(**inputs, **GREEDY, use_cache=False)
    torch.testing.assert_close(calibrated(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(calibrated.generate(**inputs, **GREEDY), expected_ids)
    text = {"input_ids": inputs["input_ids"]}
    assert torch.equal(calibrated.text_model(**text).logits, plain.text_model(**text).logits)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"use_cache": False}],
)
@torch.no_grad()
def test_text_model_with_a_mask_of_the_prompt(options):
    calibrated, plain = build_text()
    prompt = {"input_ids": torch.randint(4, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    mask = torch.rand(2, 9) < 0.5
    beams = options.get("num_beams", 1)
    with reference(plain, calibrated, mask):
        expected = _steps(plain, prompt, use_cache=False, num_beams=beams)
    with vision_mask(mask.repeat_interleave(beams, 0)):
        if options.get("use_cache", True):
            _assert_same(_steps(calibrated, prompt, **options), expected)
        else:
            with pytest.raises(ValueError, match="does not fit a forward of 2 rows and 10 positions"):
                _steps(calibrated, prompt, **options)
