import pytest
import torch

from mir_lightning.llava.backbones import build_packaged_processor
from mir_lightning.llava.data import CaptionCollator, ShapesDataModule, ShapesDataset
from mir_lightning.llava.shapes import COLOURS, Scene, Thing, draw_sample


@pytest.fixture(scope="module")
def processor():
    return build_packaged_processor()


def test_the_same_index_is_always_the_same_sample():
    (a, caption), (b, again) = (draw_sample("train", 5, seed=3) for _ in range(2))
    assert a.tobytes() == b.tobytes()
    assert caption == again
    assert a.size == (224, 224)
    assert len({draw_sample("train", i)[0].tobytes() for i in range(50)}) == 50
    assert draw_sample("train", 5, seed=4)[0].tobytes() != a.tobytes()


def test_held_out_captions_never_appear_in_training():
    train = {draw_sample("train", i, seed)[1] for i in range(1500) for seed in (0, 1)}
    held_out = {draw_sample("held_out", i, seed)[1] for i in range(300) for seed in (0, 1)}
    assert not train & held_out
    assert len(held_out) > 150


def test_captions_name_colour_size_number_and_relation():
    assert Scene(Thing("red", "circle", "small"), count=3).caption == "Three small red circles."
    assert Scene(Thing("red", "cross", "small"), count=2).caption == "Two small red crosses."
    scene = Scene(Thing("red", "star", "large"), relation="above", other=Thing("blue", "square", "small"))
    assert scene.caption == "A large red star above a small blue square."


def test_the_picture_shows_what_the_caption_says():
    """Find each thing's pixels by colour, and check their side and number."""
    checked = 0
    for index in range(200):
        image, caption = draw_sample("train", index)
        words = caption.lower().rstrip(".").split()
        colours = [w for w in words if w in COLOURS]
        if len(colours) != 2 or len(set(colours)) != 2:
            continue
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 3).int()
        centres = []
        for colour in colours:
            here = (pixels - torch.tensor(COLOURS[colour])).abs().sum(-1) < 10
            centres.append(here.nonzero().double().mean(dim=0))
        (y1, x1), (y2, x2) = centres
        shown = {"left": x1 < x2, "right": x1 > x2, "above": y1 < y2, "below": y1 > y2}
        assert shown[next(w for w in words if w in shown)], caption
        checked += 1
    assert checked > 50


def test_pixels_are_what_efficientnet_lite_expects(processor):
    image, caption = draw_sample("train", 0)
    batch = CaptionCollator(processor)([(image, caption)])
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 3).float()
    torch.testing.assert_close(
        batch["pixel_values"][0], ((pixels - 127) / 128).permute(2, 0, 1), atol=1e-5, rtol=0
    )


def test_loss_is_on_the_caption_and_its_end_only(processor):
    samples = [draw_sample("train", i) for i in range(6)]
    batch = CaptionCollator(processor)(samples)
    for ids, labels, (_, caption) in zip(batch["input_ids"], batch["labels"], samples, strict=True):
        learned = processor.tokenizer.decode(labels[labels != -100])
        assert learned == f"{caption}<|im_end|>\n"
        assert (labels[labels != -100] == ids[labels != -100]).all()
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [49] * 6
    assert processor.tokenizer.decode(batch["input_ids"][0][:5]).startswith("<|im_start|>system")


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        ShapesDataModule(num_samples=0)
    with pytest.raises(IndexError):
        ShapesDataset("train", 3)[3]
    with pytest.raises(RuntimeError, match="attach it to a Trainer"):
        ShapesDataModule().probe()
