"""Pictures of other sizes than the encoder's, and pictures in tiles."""

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitImageProcessorPil,
    Dinov2Model,
    LlavaNextForConditionalGeneration,
)

from mir_lightning import Probe, evaluate_image_gain, evaluate_mir
from mir_lightning.llava.data.batches import ConversationCollator
from mir_lightning.llava.data.prompts import PlainPrompt
from mir_lightning.llava.data.source import Sample
from mir_lightning.llava.demo.weights import EfficientNetLiteConfig, build_packaged_vision
from mir_lightning.llava.model.backbones import ModelSource, build_model, build_processor
from mir_lightning.llava.model.module import LlavaPretraining
from mir_lightning.llava.model.resolution import check_multiple, made_size
from mir_lightning.llava.model.saving import export
from mir_lightning.probing import ChoiceProbe, evaluate_choices
from mir_lightning.vlm import parameters_of, token_masks
from tests.items import item, picture

SIZES = ((16, 16), (40, 16), (16, 24), (9, 30), (16, 16))


def _source(parts, vision, **options):
    return ModelSource(llm=str(parts / "llama"), vision=str(parts / vision), **options)


def _batch(processor):
    """Of square and oblong pictures, whose texts have different lengths."""
    samples = [
        Sample((picture(i, *size),), ("What colour? <image>", f"The star is {'red ' * (i + 3)}."))
        for i, size in enumerate(SIZES)
    ]
    made = ConversationCollator(processor, PlainPrompt())(samples)
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("size", [8, 24])
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_an_encoder_at_another_resolution_is_one_that_interpolates(parts, vision, size, tmp_path):
    plain = build_model(_source(parts, vision), build_processor(_source(parts, vision))).model.vision_tower.eval()
    source = _source(parts, vision, image_size=size)
    processor = build_processor(source)
    model = build_model(source, processor).eval()
    batch, tokens = _batch(processor), (size // 4) ** 2
    assert batch["pixel_values"].shape[-2:] == (size, size)
    with torch.no_grad():
        ours = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
        options = {} if vision == "dinov2" else {"interpolate_pos_encoding": True}  # it always does
        theirs = plain(batch["pixel_values"], output_hidden_states=True, **options).hidden_states
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert token_masks(model.config, batch, "all").vision.sum(dim=1).tolist() == [tokens] * len(SIZES)
    assert model.config.image_seq_length == tokens
    export(model, processor, tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    again = _batch(AutoProcessor.from_pretrained(tmp_path / "model"))
    assert evaluate_mir(loaded, Probe([again])).mir == evaluate_mir(model, Probe([batch]), check=True).mir


def test_what_is_cropped_keeps_its_share(parts):
    processor = build_processor(_source(parts, "clip", image_size=32))
    assert made_size(processor.image_processor) == 32
    assert processor.image_processor.to_dict()["size"]["shortest_edge"] == 32
    siglip = build_processor(_source(parts, "siglip", image_size=32)).image_processor.to_dict()
    assert (siglip["size"]["height"], siglip["size"]["width"]) == (32, 32)


def test_an_encoder_follows_its_image_processor(parts, tmp_path):
    """The hub's DINOv2 was trained on 518 pixels, and its image processor makes 224."""
    Dinov2Model.from_pretrained(parts / "dinov2").save_pretrained(tmp_path)
    BitImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(
        tmp_path
    )
    source = ModelSource(llm=str(parts / "llama"), vision=str(tmp_path), connector="avg_pool", visual_tokens=9)
    processor = build_processor(source)
    model = build_model(source, processor)
    assert token_masks(model.config, _batch(processor), "all").vision.sum() == 9 * len(SIZES)
    assert evaluate_mir(model, Probe([_batch(processor)])).mir > 0


def test_sizes_that_cannot_be(parts):
    for size, near in ((18, "16 or 20"), (3, "4"), (0, "4")):
        says = f"image_size must be a multiple of the encoder's patch of 4 pixels, got {size}: {near} would do"
        with pytest.raises(ValueError, match=says):
            build_processor(_source(parts, "clip", image_size=size))
    images = build_processor(_source(parts, "siglip")).image_processor
    images.size = {"height": 16, "width": 24}
    with pytest.raises(ValueError, match="makes pictures of 16 x 24 pixels: they have to be square"):
        made_size(images)


def test_the_packaged_encoder_sees_any_multiple_of_its_stride():
    encoder = build_packaged_vision(128)
    assert encoder.config.image_size == 128
    net = EfficientNet.from_name("efficientnet-lite0", image_size=128)  # whose paddings are made for this size
    net._fc = torch.nn.Identity()
    net.load_state_dict(encoder.net.state_dict())
    pixels = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        features = encoder(pixels).last_hidden_state
        expected = net.eval().extract_features(pixels).flatten(2).transpose(1, 2)
    assert features.shape == (1, 16, 1280)
    assert torch.equal(features, torch.nn.functional.layer_norm(expected, (1280,)))
    with pytest.raises(ValueError, match="patch of 32 pixels, got 150: 128 or 160 would do"):
        check_multiple(150, EfficientNetLiteConfig().patch_size)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_tiles_are_a_llava_next(parts, vision, tmp_path):
    options = {"llm": str(parts / "llama"), "vision": str(parts / vision), "tiles": 3, "image_size": 8}
    module = LlavaPretraining(**options)
    module.configure_model()
    model, processor = module.vlm, module.processor
    assert type(model) is LlavaNextForConditionalGeneration
    batch = _batch(processor)
    mask = token_masks(model.config, batch, "all").vision
    # Patches of the whole, of the tiles but for their padding, and a newline a row; tiles in rows x columns.
    assert mask.sum(dim=1).tolist() == [4 + 2 * 2 + 2, 4 + 2 * 6 + 2, 4 + 4 * 2 + 4, 4 + 6 * 2 + 6, 10]
    assert batch["pixel_values"].shape[1] == 1 + 3
    assert evaluate_mir(model.eval(), Probe([batch]), check=True).mir > 0
    assert evaluate_image_gain(model, Probe([batch])).gain != 0
    asked = ChoiceProbe(
        [item("one", "<image>Colour? Answer:", "red", "blue", images=[picture(0, 40, 16)])], processor
    )
    assert 0 < evaluate_choices(model, asked).sds < 1
    learns = parameters_of(model, "projector")
    assert {name.split(".")[1] for name in learns} == {"multi_modal_projector", "image_newline"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learns.keys()
    model(**batch, use_cache=False).loss.backward()
    torch.optim.AdamW(learns.values(), lr=0.1).step()
    export(model, processor, tmp_path / "model")
    loaded, found = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(found.values())
    again = _batch(AutoProcessor.from_pretrained(tmp_path / "model"))
    assert all(torch.equal(again[key], batch[key]) for key in batch)
    assert evaluate_mir(loaded, Probe([again])).mir == evaluate_mir(model, Probe([batch])).mir


def test_tiles_have_the_colours_of_the_encoders_pictures(parts):
    for vision in ("clip", "siglip"):
        whole = build_processor(_source(parts, vision)).image_processor
        cut = build_processor(_source(parts, vision, tiles=2)).image_processor
        seen = [
            made(Image.new("RGB", (16, 16), "orange"), return_tensors="pt")["pixel_values"]
            for made in (whole, cut)
        ]
        torch.testing.assert_close(seen[1][:, 0], seen[0])


def test_what_does_not_go_with_tiles(parts):
    for options, says in (
        ({"tiles": 1}, "model.tiles must be 2 or more, got 1"),
        ({"tiles": 4, "connector": "avg_pool"}, "model.tiles goes with model.connector=mlp alone, got 'avg_pool'"),
        ({"tiles": 4, "feature_select": "full"}, "model.tiles needs the features of patches alone, got 17 of 16"),
    ):
        with pytest.raises(ValueError, match=says):
            build_processor(_source(parts, "clip", **options))


@pytest.mark.parametrize(
    "option", [{"connector": "linear"}, {"visual_tokens": 4}, {"image_size": 32}, {"tiles": 4}]
)
def test_a_whole_model_keeps_its_own(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"vlm comes with its own {name}: {name}=.* goes with llm and vision"):
        ModelSource(vlm="somewhere", **option)
