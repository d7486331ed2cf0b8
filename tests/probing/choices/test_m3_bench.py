"""M3-Bench's folders, as its released scripts read them."""

import json

import pytest
from PIL import Image

from mir_lightning.probing import load_m3_bench
from mir_lightning.probing.choices.m3_bench import ABILITIES

QUESTION = {"question": "What is it?", "answer": "a cat", "distraction": ["a dog", "a bird"]}


def _write(folder, name, questions, pictures):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_{len(questions)}_pretrained_mllm_eval.json").write_text(json.dumps(questions))
    for picture in pictures:
        (folder / "images" / picture).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / "images" / picture)


@pytest.fixture
def bench(tmp_path):
    general = tmp_path / "general_visual_question_answering"
    _write(general, "MMBench_action_recognition", {"54": QUESTION}, ["action_recognition/54.jpg"])
    _write(
        general,
        "MMBench_social_relation",
        {"7": QUESTION, "8": QUESTION},
        [f"social_relation/{i}.jpg" for i in "78"],
    )
    _write(
        tmp_path / "multiple_discipline_reasoning",
        "MMMU_Pro_Art",
        {
            "val_1": {
                **QUESTION,
                "question": "See <image 2>, then <image 1>.",
                "ori_options": "['a cat', 'a dog']",
            },
            "val_2": {
                "question": "Which of <image 1>?",
                "answer": "<image 2>",
                "distraction": ["<image 3>"],
                "ori_options": "['<image 2>', '<image 3>']",
            },
        },
        [f"Art/val_{q}_image_{k}.png" for q in (1, 2) for k in (1, 2, 3)],
    )
    _write(tmp_path / "mathematical_reasoning", "MathVista", {"12--a": QUESTION, "12--b": QUESTION}, ["12.jpg"])
    _write(
        tmp_path / "physical_reasoning", "SeePhys", {"3--x": {**QUESTION, "img_num": 2}}, ["3_0.png", "3_1.png"]
    )
    _write(tmp_path / "spatial_reasoning", "Spatial", {"s": {**QUESTION, "answer": 4}}, ["s.jpg"])
    for kind in ("animal", "plant", "attraction", "celebrity"):
        _write(tmp_path / f"Wiki_{kind}_identification", f"Wiki_{kind}", {"Q1--0": QUESTION}, ["Q1.jpg"])
    return tmp_path


def _by_id(items):
    return {item.id: item for item in items}


def test_every_task_folder(bench):
    items = load_m3_bench(bench)
    assert {item.task.split("/")[0] for item in items} == set(ABILITIES)
    abilities = {item.task: item.ability for item in items}
    assert abilities["general_visual_question_answering/action_recognition"] == "perception"
    assert abilities["general_visual_question_answering/social_relation"] == "reasoning"
    assert abilities["Wiki_plant_identification"] == "perception"
    assert {abilities[t] for t in abilities if t.endswith("_reasoning")} == {"reasoning"}
    found = _by_id(items)
    assert len(found) == 13
    cat = found["general_visual_question_answering/action_recognition/54"]
    assert cat.candidates == ("a cat", "a dog", "a bird")
    assert cat.images == (bench / "general_visual_question_answering/images/action_recognition/54.jpg",)
    assert found["spatial_reasoning/s"].answer == "4"


def test_pictures_of_a_question(bench):
    found = _by_id(load_m3_bench(bench))
    images = {name: [path.relative_to(bench).as_posix() for path in item.images] for name, item in found.items()}
    assert images["mathematical_reasoning/12--a"] == ["mathematical_reasoning/images/12.jpg"]
    assert images["mathematical_reasoning/12--b"] == ["mathematical_reasoning/images/12.jpg"]
    assert images["physical_reasoning/3--x"] == [f"physical_reasoning/images/3_{i}.png" for i in range(2)]
    several = found["multiple_discipline_reasoning/val_1"]
    assert several.prompt == "See <image>, then <image>."
    assert [path.name for path in several.images] == ["val_1_image_2.png", "val_1_image_1.png"]


def test_pictures_as_options_become_letters_in_a_seeded_order(bench):
    seen = set()
    for seed in range(8):
        item = _by_id(load_m3_bench(bench, seed=seed))["multiple_discipline_reasoning/val_2"]
        assert item == _by_id(load_m3_bench(bench, seed=seed))["multiple_discipline_reasoning/val_2"]
        assert item.prompt == "Which of <image>? A. <image> B. <image> Please select the correct option:"
        names = [path.name for path in item.images]
        assert names[0] == "val_2_image_1.png"
        assert names[1 + "AB".index(item.answer)] == "val_2_image_2.png"
        assert sorted(item.candidates) == ["A", "B"]
        seen.add(item.answer)
    assert seen == {"A", "B"}


def test_tasks_and_distractors_are_chosen(bench):
    items = load_m3_bench(bench, ["mathematical_reasoning"], max_distractors=1, seed=3)
    assert [len(item.distractors) for item in items] == [1, 1]
    assert items == load_m3_bench(bench, ["mathematical_reasoning"], max_distractors=1, seed=3)


def test_bad_folders_and_items(bench, tmp_path):
    with pytest.raises(ValueError, match=r"tasks: chess not found in .*known are general_visual"):
        load_m3_bench(bench, ["chess"])
    (tmp_path / "empty" / "spatial_reasoning").mkdir(parents=True)
    with pytest.raises(ValueError, match="spatial_reasoning holds no JSON file"):
        load_m3_bench(tmp_path / "empty")
    with pytest.raises(ValueError, match="holds no task folder of M3-Bench: looked for"):
        load_m3_bench(tmp_path / "nowhere")
    (bench / "physical_reasoning/images/3_1.png").unlink()
    (bench / "mathematical_reasoning/images/12.jpg").unlink()
    with pytest.raises(ValueError) as caught:
        load_m3_bench(bench)
    for name in (
        "physical_reasoning/3--x: image",
        "mathematical_reasoning/12--a: image",
        "12--b: image",
        "3_1.jpg",
    ):
        assert name in str(caught.value)
    file = bench / "spatial_reasoning/Spatial_1_pretrained_mllm_eval.json"
    file.write_text("[]")
    with pytest.raises(ValueError, match="must hold an object of questions by id"):
        load_m3_bench(bench)
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_m3_bench(bench)
