from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from mir_lightning.llava.demo.questions import shapes_choices, shapes_few_shot
from mir_lightning.llava.demo.shapes import COLOURS, RELATIONS, SIZES, draw_sample
from mir_lightning.metrics import SoftDiscriminationScore
from mir_lightning.probing.choices.items import check_items, open_image

CHANCE = {"colour": 6, "shape": 5, "size": 2, "count": 4, "relation": 4, "comparison": 2, "arithmetic": 3}


@pytest.fixture(scope="module")
def items():
    return shapes_choices(60)


def _of(items, task):
    return [item for item in items if item.task == task]


def test_several_hundred_items_of_each_task_with_balanced_answers():
    items = check_items(shapes_choices())
    assert Counter(item.task for item in items) == dict.fromkeys(CHANCE, 300)
    for task, answers in CHANCE.items():
        assert {len(item.candidates) for item in _of(items, task)} == {answers}
        if task != "comparison":  # its answers are the kinds compared
            assert set(Counter(item.answer for item in _of(items, task)).values()) == {300 // answers}
    abilities = {item.task: item.ability for item in items}
    assert [t for t in CHANCE if abilities[t] == "perception"] == ["colour", "shape", "size", "count"]
    assert [t for t in CHANCE if abilities[t] == "reasoning"] == ["relation", "comparison", "arithmetic"]


def test_whoever_does_not_look_is_at_chance_exactly(items):
    """Any scores that depend on the texts alone."""
    metric = SoftDiscriminationScore({item.task: item.ability for item in items})
    for item in items:
        scores = [hash((item.prompt, candidate)) % 1000 / 100 for candidate in item.candidates]
        metric.update([torch.tensor(scores, dtype=torch.float64)], item.task)
    for task, answers in CHANCE.items():
        found = next(v for k, v in metric.compute_breakdown().items() if k.endswith(f"/{task}"))
        assert found.sds == pytest.approx(1 / answers, rel=1e-9)
        assert found.accuracy == pytest.approx(1 / answers)
        assert found.chance == pytest.approx(1 / answers)


def test_seeded_and_without_a_repeated_picture(items):
    again, other = shapes_choices(60), shapes_choices(60, seed=1)
    for task in CHANCE:
        first, same, others = (_of(x, task)[7] for x in (items, again, other))
        assert first.prompt == same.prompt
        assert open_image(first.images[0]).tobytes() == open_image(same.images[0]).tobytes()
        assert open_image(first.images[0]).tobytes() != open_image(others.images[0]).tobytes()
        assert len({open_image(item.images[0]).tobytes() for item in _of(items, task)}) == 60


def test_scenes_are_held_out(items):
    train = {draw_sample("train", i)[1] for i in range(2000)}
    scenes = [item.images[0].args[0] for item in items if item.task not in ("comparison", "arithmetic")]
    assert len(scenes) == 5 * 60
    assert {scene.split for scene in scenes} == {"held_out"}
    assert not {scene.caption for scene in scenes} & train


def test_scenes_show_the_answer(items):
    for item in items:
        if item.task in ("comparison", "arithmetic"):
            continue
        scene = item.images[0].args[0]
        things = [scene.thing, scene.other]
        if item.task == "count":
            assert ["one", "two", "three", "four"][scene.count - 1] == item.answer
        elif item.task == "relation":
            assert item.answer == scene.relation
            assert f"the {things[0].shape}, seen from the {things[1].shape}" in item.prompt
            assert things[0].shape != things[1].shape
        else:
            named = "colour" if item.task == "shape" else "shape"
            meant = [t for t in things if getattr(t, named) in item.prompt.split("?")[0].split()]
            assert [getattr(t, item.task) for t in meant] == [item.answer], item.prompt
    assert set(RELATIONS) | set(SIZES) <= {item.answer for item in items}


def _area(item, colour):
    pixels = np.asarray(open_image(item.images[0])).astype(int)
    return int((np.abs(pixels - np.array(COLOURS[colour])).sum(-1) < 10).sum())


def test_pictures_of_two_groups_show_the_answer():
    """Count each kind by the pixels of its colour, against the picture of the same question with other numbers."""
    by_question = defaultdict(list)
    for item in _of(shapes_choices(40), "comparison"):
        by_question[item.id.rsplit("/", 1)[0]].append(item)
    for pair in by_question.values():
        colours = [text.split()[0] for text in pair[0].candidates]
        areas = [[_area(item, colour) for colour in colours] for item in pair]
        assert areas[0][0] > areas[1][0]
        assert areas[0][1] < areas[1][1]
    for item in _of(shapes_choices(30), "arithmetic"):
        first, first_count, second, second_count, _ = item.images[0].args
        assert ["one", "two", "three"][first_count - second_count - 1] == item.answer
        assert item.prompt.startswith(f"How many more {first.colour} {first.shape}")
        assert second.colour in item.prompt


def test_small_numbers_are_whole_questions():
    assert Counter(item.task for item in shapes_choices(7)) == {
        task: max(1, 7 // answers) * answers for task, answers in CHANCE.items()
    }
    with pytest.raises(ValueError, match="per_task must be at least 1, got 0"):
        shapes_choices(0)


def test_few_shot_captions_to_write_are_held_out_and_those_shown_are_not():
    items, examples = shapes_few_shot(12)
    check_items(items, open_ended=True)
    check_items(examples, open_ended=True)
    assert Counter(item.task for item in items) == {"caption": 12, "vqa": 7 * 12 - 2}
    written = {item.answer for item in items if item.task == "caption"}
    assert not written & {item.answer for item in examples}
    assert written <= {draw_sample("held_out", i)[1].lower().rstrip(".") for i in range(12)}
    assert not {item.id for item in items} & {item.id for item in examples}
    caption = items[0]
    assert caption.prompt == "<image> A photo of"
    assert open_image(caption.images[0]).tobytes() == draw_sample("held_out", 0)[0].tobytes()
    assert items[12].prompt.startswith("<image> Question: What colour is the ")
    assert items[12].prompt.endswith("? Short answer:")
