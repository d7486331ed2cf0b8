import json

import pytest
from PIL import Image

from mir_lightning.probing import ChoiceItem, load_choice_items
from mir_lightning.probing.choices.items import check_items, open_image, sample_distractors


def _picture(path, colour=(9, 8, 7), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).convert(mode).save(path)
    return path


def _write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


ROW = {"question": "What?", "answer": "red", "distractors": ["green"], "task": "colour", "ability": "perception"}


def test_a_jsonl_of_ones_own(tmp_path):
    _picture(tmp_path / "a.png")
    _picture(tmp_path / "sub" / "b.jpg")
    rows = [
        {**ROW, "id": "first", "image": "a.png"},
        {**ROW, "images": ["a.png", "sub/b.jpg"], "question": "<image> or <image>?", "answer": 3},
        {**ROW, "distractors": ["green", "blue"]},
    ]
    items = load_choice_items(_write(tmp_path / "own.jsonl", rows))
    assert items[0] == ChoiceItem(
        "first", "What?", "red", ("green",), "colour", "perception", (tmp_path / "a.png",)
    )
    assert items[1].images == (tmp_path / "a.png", tmp_path / "sub" / "b.jpg")
    assert (items[1].id, items[1].answer) == ("line 2", "3")
    assert items[2].candidates == ("red", "green", "blue")
    assert items[2].images == ()


def test_pictures_from_files_objects_and_callables(tmp_path):
    path = _picture(tmp_path / "grey.png", mode="L")
    for source in (path, str(path), Image.new("RGBA", (4, 4)), lambda: Image.new("P", (4, 4))):
        opened = open_image(source)
        assert (opened.mode, opened.size) == ("RGB", (4, 4))


def test_distractor_sampling_is_seeded_and_keeps_order():
    texts = [str(i) for i in range(20)]
    chosen = sample_distractors(texts, 5, 0, "a")
    assert chosen == sample_distractors(texts, 5, 0, "a")
    assert len(set(chosen)) == 5
    assert list(chosen) == sorted(chosen, key=int)
    assert len({sample_distractors(texts, 5, seed, name) for seed in range(3) for name in "abc"}) == 9
    assert sample_distractors(texts, None, 0, "a") == sample_distractors(texts, 50, 0, "a") == tuple(texts)
    with pytest.raises(ValueError, match="max_distractors must be at least 1, got 0"):
        sample_distractors(texts, 0, 0, "a")


def test_the_loader_samples(tmp_path):
    path = _write(tmp_path / "own.jsonl", [{**ROW, "distractors": [str(i) for i in range(9)]}] * 4)
    chosen = [item.distractors for item in load_choice_items(path, 2, seed=1)]
    assert chosen == [item.distractors for item in load_choice_items(path, 2, seed=1)]
    assert {len(d) for d in chosen} == {2}
    assert len(set(chosen)) > 1


def test_bad_items_are_listed_with_their_ids_in_one_error(tmp_path):
    rows = [
        ROW,
        {**ROW, "id": "a", "image": "gone.png"},
        {**ROW, "id": "b", "distractors": []},
        {**ROW, "id": "c", "answer": " "},
        {**ROW, "id": "d", "distractors": ["green", "red "]},
        {**ROW, "id": "e", "distractors": [""]},
        {**ROW, "id": "f", "question": "<image> and <image>", "images": ["x.png"]},
        {**ROW, "id": "g", "task": ""},
        {k: v for k, v in ROW.items() if k not in ("ability", "task")} | {"id": "h", "task": "other"},
        {**ROW, "id": "b"},
        {**ROW, "id": "i", "ability": "reasoning"},
        {**ROW, "id": "j", "question": ""},
    ]
    with pytest.raises(ValueError) as caught:
        load_choice_items(_write(tmp_path / "own.jsonl", rows))
    text = str(caught.value)
    assert "in 12 items" in text
    for problem in (
        f"a: image {tmp_path / 'gone.png'} is missing",
        "b: no distractor",
        "c: empty answer",
        "d: duplicate answer 'red'",
        "e: empty distractor",
        "f: 2 <image> in its prompt and 1 images",
        "g: no task",
        "h: no ability",
        "b: its id is not unique",
        "i: task 'colour' belongs to 'perception' and 'reasoning'",
        "j: neither question nor image",
    ):
        assert problem in text
    assert "line 1:" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distractors": "green"}, "own.jsonl, line 1: distractors must be a list of texts, got 'green'."),
        ({"answer": None}, "own.jsonl, line 1: answer must be a text or a number, got None."),
        ({"images": "a.png"}, "own.jsonl, line 1: images must be a list of texts, got 'a.png'."),
    ],
)
def test_values_that_would_become_other_texts(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_choice_items(_write(tmp_path / "own.jsonl", [{**ROW, **change}]))


def test_files_that_are_no_items(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(ROW) + "\n{")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        load_choice_items(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="line 1 must be a JSON object, got list"):
        load_choice_items(path)
    path.write_text("")
    with pytest.raises(ValueError, match="items is empty"):
        load_choice_items(path)
    with pytest.raises(TypeError, match="items must be ChoiceItem objects, got dict"):
        check_items([ROW])
