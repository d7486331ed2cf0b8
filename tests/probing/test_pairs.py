"""Probes of image-text pairs: made when asked for, text counted from behind the image."""

import weakref

import pytest

from mir_lightning import evaluate_mir
from mir_lightning.probing.pairs import Pair, PairProbe, read_pairs
from tests.models import tiny_llava


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
