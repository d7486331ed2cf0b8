"""One rule for all families: where the layers are, which positions are vision, which are text."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mir_lightning import Probe, evaluate_mir
from mir_lightning.functional import modality_integration_rate
from mir_lightning.probing.evaluate import UncheckedMaskWarning
from mir_lightning.vlm import find_decoder, token_masks
from tests.families import FAMILIES, IMAGE, TEXT, VISION, build_family, family_batch
from tests.models import tiny_batch, tiny_llava


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_measured_where_it_says_its_hidden_states_are(family):
    model, batch = build_family(family), family_batch(family)
    result = evaluate_mir(model, Probe([batch]), check=True)
    vision = batch["input_ids"] == IMAGE
    text = (batch["input_ids"] != 0) & (torch.arange(vision.shape[1]) >= 3) & ~vision
    assert (result.vision_tokens, result.text_tokens) == (2 * FAMILIES[family].tokens, 10)
    assert len(result.layers) == 3
    assert result.checked
    if FAMILIES[family].records:
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states[1:]
        expected = modality_integration_rate([s[vision] for s in states], [s[text] for s in states])
        assert result.mir == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "chameleon"])
def test_the_check_finds_a_mask_that_misses_a_vision_token(family):
    model, batch = build_family(family), family_batch(family)
    mask = batch["input_ids"] == IMAGE
    mask[1, 4] = False
    with pytest.raises(ValueError, match=r"1 positions outside it carry pixels \(sample 1, position 4, token 3"):
        evaluate_mir(model, Probe([{**batch, "vision_mask": mask}]), check=True)
    assert evaluate_mir(model, Probe([{**batch, "vision_mask": mask}])).mir


def test_the_check_needs_pixels_that_reach_the_decoder():
    model, batch = tiny_llava(), tiny_batch()
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.zero_()
    with pytest.warns(UncheckedMaskWarning, match="no input of the first decoder layer moves with the pixels"):
        assert not evaluate_mir(model, Probe([batch]), check=True).checked
    with pytest.warns(UncheckedMaskWarning, match="the batches hold no pixels"):
        evaluate_mir(model, Probe([{k: v for k, v in batch.items() if k != "pixel_values"}]), check=True)
    with pytest.raises(ValueError, match="check works with Hugging Face models only"):
        evaluate_mir(torch.nn.Linear(1, 1), Probe([batch]), hidden_states=lambda m, b: [], check=True)


def test_marks_around_images_are_not_text():
    model, batch = build_family("glm4v"), family_batch("glm4v")
    first = 3 + FAMILIES["glm4v"].tokens
    batch["input_ids"][:, first] = model.config.image_end_token_id
    masks = token_masks(model.config, batch, "after_vision")
    assert not masks.text[:, first].any()
    assert masks.text.sum() == 8
    assert token_masks(model.config, {**batch, "text_mask": ~masks.vision}, "all").text[:, first].all()


def test_layers_and_image_token_can_be_told():
    model, batch = tiny_llava(), tiny_batch()
    found = evaluate_mir(model, Probe([batch]))
    told = evaluate_mir(model, Probe([batch]), layers="model.language_model.layers", image_token_id=3)
    torch.testing.assert_close(told.layers, found.layers, rtol=0, atol=0)
    batch["input_ids"][:, 15] = 60
    others = int((batch["input_ids"] == 60).sum())
    assert evaluate_mir(model, Probe([batch]), image_token_id=60, text="all").vision_tokens == others
    with pytest.raises(ValueError, match=r"layers='model.nowhere' names no submodule"):
        evaluate_mir(model, Probe([batch]), layers="model.nowhere")
    with pytest.raises(ValueError, match="must name the ModuleList of decoder layers, it is LlamaModel"):
        evaluate_mir(model, Probe([batch]), layers="model.language_model")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("mllama", "sees images through cross-attention"),
        ("idefics", "sees images through cross-attention"),
        ("blip", "sees images through cross-attention"),
        ("florence2", "is an encoder-decoder"),
        ("t5gemma2", "is an encoder-decoder"),
        ("pix2struct", "is an encoder-decoder"),
        ("pi0", r"no decoder layers found .* layers="),
    ],
)
def test_unsupported_architectures_are_told_apart(family, message):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family]())
    with pytest.raises(ValueError, match=message):
        evaluate_mir(model, Probe([tiny_batch()]))


def test_vision_tokens_inserted_inside_the_model():
    config = CONFIG_MAPPING["git"](
        **{key: value for key, value in TEXT.items() if "key_value" not in key},
        vision_config={**VISION, "hidden_size": 32},
    )
    batch = {key: value for key, value in tiny_batch().items() if key != "labels"}
    batch["pixel_values"] = torch.randn(4, 3, 16, 16)
    batch["vision_mask"] = batch["input_ids"] == IMAGE
    model = AutoModelForImageTextToText.from_config(config)
    for check in (False, True):
        with pytest.raises(ValueError, match="inserts vision tokens inside the model"):
            evaluate_mir(model, Probe([batch]), check=check)


def test_parallel_residual_streams():
    model = tiny_llava()
    first, second = model.model.language_model.layers[:2]
    first.register_forward_hook(lambda _m, _a, output: torch.stack([output, output]))
    second.register_forward_pre_hook(lambda _m, args: (args[0][0], *args[1:]))
    with pytest.raises(ValueError, match=r"gave \[2, 4, 19, 24\] .* keeps parallel residual streams apart"):
        evaluate_mir(model, Probe([tiny_batch()]))


def test_a_model_that_takes_no_pixels():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TEXT))
    with pytest.raises(ValueError, match="LlamaForCausalLM takes no pixels"):
        evaluate_mir(model, Probe([tiny_batch()]))


def test_no_image_token():
    model, batch = build_family("kosmos-2"), family_batch("kosmos-2")
    del batch["image_embeds_position_mask"]
    with pytest.raises(ValueError, match=r"no image token found: .* Give image_token_id, or each probe batch a"):
        evaluate_mir(model, Probe([batch]))


def test_the_deepest_decoder_wins():
    """OPT's get_decoder has to be asked again; the vision tower's list is as long and not taken."""
    model = build_family("blip-2")
    assert find_decoder(model).layers is model.language_model.model.decoder.layers
    assert np.prod(model.language_model.model.decoder.layers[0].fc1.weight.shape) == 32 * 48
