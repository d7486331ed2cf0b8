from pathlib import Path

import pytest
import torch
from PIL import Image

from mir_lightning.llava.data.batches import ConversationCollator
from mir_lightning.llava.data.prompts import ChatPrompt, PlainPrompt, missing_start
from mir_lightning.llava.data.source import Sample
from mir_lightning.llava.demo.shapes import COLOURS, Scene, ShapesDataset, Thing, draw_sample
from mir_lightning.llava.demo.weights import build_packaged_processor
from mir_lightning.llava.model.module import model_inputs
from mir_lightning.probing.images import UnreadableImageError
from tests.items import QWEN_IMAGE, picture
from tests.processors import FAMILIES, build


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


def test_a_plain_prompt_begins_with_the_token_that_begins_a_sequence(processor, tiny_processor):
    start = missing_start(processor.tokenizer)
    assert start == processor.tokenizer.bos_token == "<|im_start|>"
    prompt, image = PlainPrompt(start), Image.new("RGB", (8, 8))
    collate = ConversationCollator(processor, prompt)
    batch = collate([Sample((image,), ("", "A cat.")), Sample((), ("No picture.",)), Sample((), ("Why?", "So."))])
    texts = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert texts == [f"{start}{processor.image_token * 49}A cat.\n", f"{start}No picture.\n", f"{start}So.\n"]
    learned = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["A cat.\n", "No picture.\n", "So.\n"]
    assert prompt.question("<image>") == f"{start}<image>"
    tiny_processor.tokenizer.bos_token = None
    assert missing_start(tiny_processor.tokenizer) == ""


@pytest.mark.parametrize(
    ("name", "written", "learned"),
    [
        (
            "short",
            "<|im_start|><image>\nWhat? A cat.<|im_end|>\nWhere? There.<|im_end|>\n",
            "A cat.<|im_end|>\n There.<|im_end|>\n",
        ),
        (
            "vicuna",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT: A cat."
            "<|im_end|> USER: Where? ASSISTANT: There.<|im_end|>",
            "A cat.<|im_end|> There.<|im_end|>",
        ),
    ],
)
def test_shipped_templates(processor, name, written, learned):
    template = (Path(__file__).parents[2] / "recipes" / "configs" / "templates" / f"{name}.jinja").read_text()
    prompt = ChatPrompt(processor.tokenizer, template=template)
    spans = prompt(("<image>\nWhat?", "A cat.", "Where?", "There."), 1)
    assert "".join(span.text for span in spans) == written
    said = "".join(span.text for span in spans if span.learned)
    assert said.replace(" ", "") == learned.replace(" ", "")
    assert written.startswith(prompt.question("<image>\nWhat?"))


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


HEAD = "<|im_start|>{{ m['role'] }}\n"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEXTS = "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}"
LAST_QUESTION = (
    "{% set n = namespace(q=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set n.q = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
THINKS = "{% if m['role'] == 'assistant' and loop.index0 > n.q %}<think>\n\n</think>\n\n{% endif %}"
# How families write conversations, and what is learned of two answers.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}" + HEAD + "{{ m['content'] }}" + END,
        "A kite.<|im_end|>\nGreen.<|im_end|>\n",
    ),
    "trims": (
        "{% for m in messages %}" + HEAD + "{{ m['content'] | trim }}" + END,
        "A kite.<|im_end|>\nGreen.<|im_end|>\n",
    ),
    "parts": ("{% for m in messages %}" + HEAD + TEXTS + END, "A kite.<|im_end|>\nGreen.<|im_end|>\n"),
    "thinks in the last answer": (
        LAST_QUESTION + "{% for m in messages %}" + HEAD + THINKS + "{{ m['content'] }}" + END,
        "A kite.<|im_end|>\nGreen.<|im_end|>\n",
    ),
    "llama 2": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        " A kite. <|im_end|> Green. <|im_end|>",
    ),
    "vicuna": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}{% else %}"
        "{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        " A kite.<|im_end|> Green.<|im_end|>",
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "A kite.<end_of_turn>\nGreen.<end_of_turn>\n",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_answers_are_learned_whatever_the_template(processor, name):
    template, learned = TEMPLATES[name]
    prompt = ChatPrompt(processor.tokenizer, template=template)
    turns = ("What flies?", "A kite.", "And what colour is the field?", "Green.")
    for sample in (Sample((), turns), Sample((Image.new("RGB", (9, 9)),), turns)):
        batch = ConversationCollator(processor, prompt)([sample])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        assert processor.tokenizer.decode(labels[labels != -100]) == learned
        text = processor.tokenizer.decode(ids).replace(processor.image_token, "")
        assert [text.count(turn) for turn in turns] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}" + HEAD + "{{ m['content'] | upper }}" + END, "writes no turn"),
        (
            "{% for m in messages %}" + HEAD + "{{ m['content'] | replace('kite', 'bird') }}" + END,
            "changes what is said",
        ),
        ("{{ messages[0]['content'] }}", "leaves out a turn"),
        (
            "{{ messages[0]['content'] }}{% if messages[1:] %}{{ raise_exception('one turn') }}{% endif %}",
            "refuses .* one turn",
        ),
    ],
)
def test_templates_that_change_what_is_said_are_refused(processor, template, message):
    with pytest.raises(ValueError, match=message):
        ChatPrompt(processor.tokenizer, template=template)(("What flies?", "A kite."), 0)


def test_samples_that_cannot_be_used_are_left_out_by_name(processor):
    picture, thin = Image.new("RGB", (9, 9)), Image.new("RGB", (900, 2))

    class Picky(type(processor)):
        def __call__(self, images=None, **options):
            if any(image.width > 200 * image.height for row in images or () for image in row):
                raise ValueError("absolute aspect ratio must be smaller than 200")
            return super().__call__(images=images, **options)

    picky = Picky(**{name: getattr(processor, name) for name in ("image_processor", "tokenizer", "patch_size")})
    picky.image_token, picky.image_token_id = processor.image_token, processor.image_token_id
    picky.vision_feature_select_strategy = "full"
    samples = [
        Sample((picture,), ("<image>", "A good one."), name="good"),
        Sample((thin,), ("<image>", "Thin."), name="thin"),
        Sample((picture,), ("<image>", f"It says {processor.image_token}."), name="token"),
        Sample((), ("Say.", "A lone \ud800 surrogate."), name="surrogate"),
        Sample((), ("words " * 300, "Cut off."), name="long"),
        Sample((picture,), ("words " * 300 + "<image>", "Cut off."), name="late"),
        Sample((picture,), ("<image>", "Two <image> places."), name="places"),
    ]
    collate = ConversationCollator(picky, ChatPrompt(processor.tokenizer), 200)
    batch = collate(samples)
    said = "\n".join(batch["unreadable"])
    for line in (
        "thin: absolute aspect ratio",
        f"token: its text holds '{processor.image_token}'",
        "surrogate: ",
        "long: max_length=200 leaves nothing of it to learn",
        "late: max_length=200 would cut a sample inside its pictures, which take 49 tokens and end at",
        "places: its text has 2 places",
    ):
        assert line in said
    assert "good" not in said
    assert batch["input_ids"].shape[0] == len(batch["pixel_values"]) == len(samples)
    with pytest.raises(UnreadableImageError, match="no sample of a batch can be used: long: max_length"):
        collate(samples[4:5])


def test_pictures_in_an_answer_are_not_learned(processor):
    collate = ConversationCollator(processor, ChatPrompt(processor.tokenizer))
    batch = collate([Sample((Image.new("RGB", (9, 9)),), ("Draw.", "Here: <image> done."))])
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == "Here:  done.<|im_end|>\n"
    assert (batch["input_ids"] == processor.image_token_id).sum() == 49


def test_a_batch_of_text_gets_a_blank_picture_with_nothing_to_learn(processor):
    samples = [Sample((), ("Say.", "A kite.")), Sample((), ("Say.", "A field."))]
    plain = ConversationCollator(processor, PlainPrompt(), always_pictures=False)(samples)
    batch = ConversationCollator(processor, PlainPrompt())(samples)
    assert "pixel_values" not in plain
    assert batch["pixel_values"].shape == (1, 3, 224, 224)
    assert (batch["labels"][2] == -100).all()
    width = plain["labels"].shape[1]
    assert torch.equal(batch["labels"][:2, :width], plain["labels"])
    assert (batch["labels"][:2, width:] == -100).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_are_what_the_models_own_processor_makes(family):
    model, processor = build(family)
    mark = QWEN_IMAGE if "qwen" in family else processor.image_token
    processor.chat_template = (  # tells what stands for a picture
        "{% for c in messages[0]['content'] %}{% if c['type'] == 'image' %}"
        + mark
        + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    )
    prompt, samples = PlainPrompt(), []
    for seed, sizes in enumerate([[(16, 16)], [(24, 16), (16, 24)], [(16, 16)]]):
        images = tuple(picture(10 * seed + i, *size) for i, size in enumerate(sizes))
        samples.append(Sample(images, ("", ("a red star", "two green circles", "it")[seed])))
    batch = ConversationCollator(processor, prompt)(samples)
    batch.pop("unreadable")
    whole = processor(
        images=[list(sample.images) for sample in samples],
        text=[mark * len(sample.images) + sample.turns[1] + "\n" for sample in samples],
        padding=True,
        return_tensors="pt",
        add_special_tokens=False,
    )
    for row, expected, valid in zip(
        batch["input_ids"], whole["input_ids"], whole["attention_mask"].bool(), strict=True
    ):
        ids = expected[valid].tolist()
        assert [token for token in row.tolist() if token in ids][: len(ids)] == ids
    assert set(batch) == {*whole, "labels"}
    for key in set(whole) - {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}:
        assert torch.equal(batch[key], whole[key]), key
    model.train()(**model_inputs(batch, flash=False), use_cache=False).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
