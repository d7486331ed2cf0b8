import pytest
import torch
from PIL import Image

from mir_lightning.llava.data.batches import ConversationCollator
from mir_lightning.llava.data.prompts import ChatPrompt, PlainPrompt
from mir_lightning.llava.data.source import Sample
from mir_lightning.llava.demo.shapes import COLOURS, Scene, ShapesDataset, Thing, draw_sample
from mir_lightning.llava.demo.weights import build_packaged_processor


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
    sample = ShapesDataset("train", 1)[0]
    batch = _demo_collator(processor)([sample])
    pixels = torch.frombuffer(bytearray(sample.images[0].tobytes()), dtype=torch.uint8).view(224, 224, 3).float()
    torch.testing.assert_close(
        batch["pixel_values"][0], ((pixels - 127) / 128).permute(2, 0, 1), atol=1e-5, rtol=0
    )


def _demo_collator(processor):
    return ConversationCollator(processor, ChatPrompt(processor.tokenizer, "You describe pictures."))


def test_loss_is_on_the_caption_and_its_end_only(processor):
    samples = [ShapesDataset("train", 6)[i] for i in range(6)]
    batch = _demo_collator(processor)(samples)
    for ids, labels, sample in zip(batch["input_ids"], batch["labels"], samples, strict=True):
        learned = processor.tokenizer.decode(labels[labels != -100])
        assert learned == f"{sample.turns[1]}<|im_end|>\n"
        assert (labels[labels != -100] == ids[labels != -100]).all()
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [49] * 6
    image = processor.image_token * 49
    assert processor.tokenizer.decode(batch["input_ids"][0]).startswith(
        "<|im_start|>system\nYou describe pictures.<|im_end|>\n<|im_start|>user\nPicture: "
        f"{image}<|im_end|>\n<|im_start|>assistant\n{samples[0].turns[1]}<|im_end|>\n"
    )


def test_the_plain_prompt_is_picture_caption_and_line_break(processor):
    image = Image.new("RGB", (8, 8))
    collate = ConversationCollator(processor, PlainPrompt())
    batch = collate([Sample((image,), ("<image>\nDescribe it.", "A cat.")), Sample((), ("No picture at all.",))])
    text = processor.tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()])
    assert text == processor.image_token * 49 + "A cat.\n"
    learned = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["A cat.\n", "No picture at all.\n"]
    assert batch["pixel_values"].shape == (1, 3, 224, 224)


def test_several_pictures_and_turns_in_one_batch(processor):
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    turns = ("<image> and <image>: which is red?", "The first.", "And this? <image>", "Blue.")
    collate = ConversationCollator(processor, ChatPrompt(processor.tokenizer))
    batch = collate(
        [Sample(tuple(images), turns), Sample((), ("Hello", "Hi.")), Sample((images[1],), ("Say.", "Green."))]
    )
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [147, 0, 49]
    learned = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["The first.<|im_end|>\nBlue.<|im_end|>\n", "Hi.<|im_end|>\n", "Green.<|im_end|>\n"]
    reds = batch["pixel_values"][:, 0].mean(dim=(1, 2))
    assert reds.argmax() == 0
    assert torch.equal(batch["pixel_values"][1], batch["pixel_values"][3])
    whole = processor.tokenizer.decode(batch["input_ids"][0])
    assert f"user\n{processor.image_token * 49} and {processor.image_token * 49}: which" in whole


def test_too_long_samples_are_cut_but_not_inside_their_pictures(processor):
    image = Image.new("RGB", (8, 8))
    sample = Sample((image,), ("", "word " * 100))
    assert ConversationCollator(processor, PlainPrompt(), 60)([sample])["input_ids"].shape == (1, 60)
    with pytest.raises(ValueError, match="max_length=40 would cut a sample inside its pictures, which take 49"):
        ConversationCollator(processor, PlainPrompt(), 40)([sample])
