"""Probes of image-text pairs: made when asked for, text counted from behind the image."""

import weakref

import pytest

from mir_lightning import evaluate_mir
from mir_lightning.probing.pairs import Pair, PairProbe, read_pairs
from tests.models import tiny_llava
from tests.processors import FAMILIES, build


@pytest.fixture(scope="module")
def model(tiny_processor):
    return tiny_llava(vocab_size=len(tiny_processor.tokenizer), image_token=tiny_processor.image_token_id)


@pytest.fixture
def pairs(tmp_path):
    from PIL import Image

    made = []
    for i in range(12):
        Image.effect_noise((20, 30), 50 + i).save(tmp_path / f"{i:02d}.png")
        made.append(Pair((tmp_path / f"{i:02d}.png",), (f"Text number {i} of twelve.",)))
    return made


def test_no_more_than_two_batches_are_alive(model, tiny_processor, pairs):
    alive, most = weakref.WeakSet(), [0]

    class Counted(PairProbe):
        def __getitem__(self, index):
            batch = super().__getitem__(index)
            alive.add(batch["pixel_values"])
            most[0] = max(most[0], len(alive))
            return batch

    result = evaluate_mir(model, Counted(tiny_processor, model.config, pairs, 1))
    assert result.vision_tokens == 120
    assert most[0] <= 2


def test_everything_behind_the_image_is_text(model, tiny_processor, pairs):
    batch = PairProbe(tiny_processor, model.config, pairs, 2, "USER: {image}\n{text} ASSISTANT:")[0]
    said = [
        tiny_processor.tokenizer.decode(ids[mask])
        for ids, mask in zip(batch["input_ids"], batch["text_mask"], strict=True)
    ]
    assert said == [f"\nText number {i} of twelve. ASSISTANT:" for i in (0, 1)]
    everything = PairProbe(tiny_processor, model.config, pairs, 2, "USER: {image}\n{text}", text="all")[0]
    ids, mask = everything["input_ids"][0], everything["text_mask"][0]
    assert tiny_processor.tokenizer.decode(ids[mask]) == "USER: \nText number 0 of twelve."


def test_the_end_of_a_text_is_the_tokenizers(model, tiny_processor, pairs):
    eos = tiny_processor.tokenizer.eos_token
    batch = PairProbe(tiny_processor, model.config, pairs, 2, "A {image} {text}{eos}")[0]
    assert tiny_processor.tokenizer.decode(batch["input_ids"][0]).endswith(f"Text number 0 of twelve.{eos}")
    tiny_processor.tokenizer.eos_token = None
    try:
        with pytest.raises(ValueError, match=r"\{eos\} in 'A \{image\} .* and the tokenizer has no eos_token"):
            PairProbe(tiny_processor, model.config, pairs, 2, "A {image} {text}{eos}")[0]
    finally:
        tiny_processor.tokenizer.eos_token = eos


def test_a_text_with_the_placeholder_is_refused(model, tiny_processor, pairs):
    bad = Pair(pairs[0].images, (f"Look: {tiny_processor.image_token}",))
    with pytest.raises(ValueError, match="holds the image placeholder"):
        PairProbe(tiny_processor, model.config, [bad])[0]
    with pytest.raises(ValueError, match=r"prompt \(--prompt\) must hold \{image\} once, and \{text\}, got 'x'"):
        PairProbe(tiny_processor, model.config, pairs, prompt="x")


_CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] if c['type'] == 'text' else 'IMAGE' }}"
    "{% endfor %}\n{% endfor %}"
)


def test_on_the_chat_route_as_well(model, tiny_processor, pairs, monkeypatch):
    token = tiny_processor.image_token
    monkeypatch.setattr(tiny_processor, "chat_template", _CHAT.replace("IMAGE", token))
    asked = [Pair(pair.images, (*pair.turns, "An answer.")) for pair in pairs[:3]]
    probe = PairProbe(tiny_processor, model.config, asked)
    assert probe.prompt is None
    assert probe[0]["text_mask"].any()
    asked[1] = Pair(asked[1].images, ("A question.", f"Look: {token}"))
    with pytest.raises(ValueError, match=rf"the text beside \S+/01\.png holds the image placeholder {token!r}"):
        PairProbe(tiny_processor, model.config, asked)[0]


def _labelled(probe, processor):
    """What is labelled in each sample, where labels are the ids themselves."""
    for batch in probe:
        chosen = batch["labels"] != -100
        assert (batch["labels"] == batch["input_ids"])[chosen].all()
        for ids, mask in zip(batch["input_ids"], chosen, strict=True):
            yield processor.tokenizer.decode(ids[mask]).strip()


@pytest.mark.parametrize("prompt", [None, "USER: {image}\n{text} ASSISTANT: 1", "A {image} {text}"])
def test_only_the_texts_are_labelled(model, tiny_processor, pairs, prompt):
    """Also those that are as long as others are not, that are in the prompt as well, or empty."""
    texts = ["A", "A longer text, with 1 number: ünïcode 🙂.", "USER", ""]
    pairs = [Pair(pair.images, (text,)) for pair, text in zip(pairs, texts, strict=False)]
    plain, labelled = (
        PairProbe(tiny_processor, model.config, pairs, 4, prompt, labels=labels) for labels in (False, True)
    )
    assert [*_labelled(labelled, tiny_processor)] == texts
    with_, without = labelled[0], plain[0]
    assert with_.pop("labels").shape == without["input_ids"].shape
    assert all(with_[key].equal(value) for key, value in without.items())
    assert "labels" not in without
    assert labelled.fingerprint != plain.fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_labelled_in_every_family(family, pairs):
    model, processor = build(family)
    prompt = "a {image} {text} b"
    if family == "gemma3":  # its prompts have a mark that becomes the placeholders
        prompt, processor.chat_template = None, _CHAT.replace("IMAGE", processor.boi_token)
    probe = PairProbe(processor, model.config, pairs[:3], 2, prompt, labels=True)
    assert [*_labelled(probe, processor)] == [pair.turns[0] for pair in pairs[:3]]


def test_of_a_conversation_the_models_turns_are_labelled(model, tiny_processor, pairs, monkeypatch):
    monkeypatch.setattr(tiny_processor, "chat_template", _CHAT.replace("IMAGE", tiny_processor.image_token))
    turns = ("One?", "One.", "And two?", "Two.")
    asked = [Pair(pairs[0].images, turns), Pair(pairs[1].images, turns[:2])]
    probe = PairProbe(tiny_processor, model.config, asked, labels=True)
    assert probe.prompt is None
    assert [*_labelled(probe, tiny_processor)] == ["One.Two.", "One."]
    changed = tiny_processor.chat_template.replace("c['text']", "c['text'] | upper")
    monkeypatch.setattr(tiny_processor, "chat_template", changed)
    with pytest.raises(ValueError, match=r"the text beside \S+/00\.png cannot be labelled"):
        PairProbe(tiny_processor, model.config, asked, labels=True)[0]


def test_a_text_before_its_picture_is_not_labelled(model, tiny_processor, pairs):
    probe = PairProbe(tiny_processor, model.config, pairs, prompt="{text} {image}", labels=True)
    with pytest.raises(ValueError, match=r"with \{image\} before \{text\} may do"):
        probe[0]


def test_texts_of_all_kinds(tmp_path, pairs):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text('{"text": "One."}\n"Two."\n')
    (texts / "b.story").write_text("Three.\n@highlight\nno")
    (texts / "c.txt").write_text("Four.")
    found = read_pairs(tmp_path, texts, 4)
    assert [pair.turns[0] for pair in found] == ["One.", "Two.", "Three.", "Four."]
    assert [pair.images[0].name for pair in found] == ["00.png", "01.png", "02.png", "03.png"]
    assert read_pairs(tmp_path, texts / "a.jsonl", 2)[1].turns == ("Two.",)
    (tmp_path / "B.JSONL").write_text('"One."\n"Two."')
    assert read_pairs(tmp_path, tmp_path / "B.JSONL", 2)[1].turns == ("Two.",)
    (tmp_path / "B.JSONL").rename(texts / "B.JSONL")
    assert read_pairs(tmp_path, texts, 2)[1].turns == ("Two.",)
    (texts / "B.JSONL").write_text('"One."\n"half \\ud83d, whole \\ud83d\\ude00"')
    with pytest.raises(
        ValueError, match=r"B\.JSONL, line 2 holds half of a character, the lone surrogate '.ud83d'"
    ):
        read_pairs(tmp_path, texts, 1)
    (texts / "B.JSONL").unlink()
    (texts / "c.txt").write_text("Four.", "utf-16")
    with pytest.raises(ValueError, match=r"c\.txt is not UTF-8"):
        read_pairs(tmp_path, texts, 1)
    (texts / "a.jsonl").write_text('{"txt": "One."}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 must be a text or an object with a"):
        read_pairs(tmp_path, texts, 1)
