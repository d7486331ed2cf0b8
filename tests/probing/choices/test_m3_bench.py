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


def test_what_cannot_be_asked_is_left_out_by_id(bench):
    file = bench / "spatial_reasoning/Spatial_1_pretrained_mllm_eval.json"
    rows = {"s": QUESTION, "empty": {**QUESTION, "distraction": []}, "many": {**QUESTION, "img_num": 13}}
    rows["twice"] = {**QUESTION, "distraction": ["a dog", "a dog"]}
    rows["itself"] = {**QUESTION, "distraction": ["a dog", "a cat"]}
    file.write_text(json.dumps(rows))
    for name in ("empty.jpg", "twice.jpg", "itself.jpg", *(f"many_{i}.png" for i in range(13))):
        Image.new("RGB", (4, 4)).save(bench / "spatial_reasoning/images" / name)
    with pytest.warns(UserWarning, match="M3-Bench") as caught:
        kept = [item.id for item in load_m3_bench(bench, ["spatial_reasoning"])]
    (told,) = (str(warning.message) for warning in caught)
    assert "M3-Bench: 3 questions are left out." in told
    assert "spatial_reasoning/empty: no distractor, so that any model is right" in told
    assert "spatial_reasoning/twice: duplicate answer 'a dog'" in told
    assert "spatial_reasoning/itself: duplicate answer 'a cat'" in told
    assert kept == ["spatial_reasoning/s", "spatial_reasoning/many"]
    with pytest.warns(UserWarning, match=r"2 questions are left out.*many: 13 pictures, and the released scripts"):
        kept = [item.id for item in load_m3_bench(bench, ["spatial_reasoning"], style="qwen")]
    assert kept == [f"spatial_reasoning/{q_id}" for q_id in ("s", "twice", "itself")]
    file.write_text(json.dumps({"empty": {**QUESTION, "distraction": []}}))
    with pytest.raises(
        ValueError, match=r"no question is left\. M3-Bench: 1 questions are left out.*empty: no dis"
    ):
        load_m3_bench(bench, ["spatial_reasoning"])


def test_pictures_flat_or_in_subfolders_with_the_whole_id_or_its_first_part(bench):
    folder = bench / "general_visual_question_answering"
    file = folder / "MMBench_social_relation_2_pretrained_mllm_eval.json"
    file.write_text(json.dumps(dict.fromkeys(("7", "8--a", "9--b", "10"), QUESTION)))
    (folder / "images/social_relation/8.jpg").rename(folder / "images/social_relation/8--a.jpg")
    Image.new("RGB", (4, 4)).save(folder / "images/social_relation/9.jpg")
    Image.new("RGB", (4, 4)).save(folder / "images/10.jpg")
    found = _by_id(load_m3_bench(bench, ["general_visual_question_answering"]))
    images = [
        found[f"general_visual_question_answering/social_relation/{q_id}"].images[0]
        for q_id in ("7", "8--a", "9--b", "10")
    ]
    places = ["social_relation/7.jpg", "social_relation/8--a.jpg", "social_relation/9.jpg", "10.jpg"]
    assert [path.relative_to(folder / "images").as_posix() for path in images] == places


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distraction": "a dog"}, "s: distraction must be a list of texts, got 'a dog'."),
        ({"distraction": ["a dog", None]}, r"s: distraction\[1\] must be a text or a number, got None."),
        ({"answer": None}, "s: answer must be a text or a number, got None."),
        ({"answer": ["a cat"]}, r"s: answer must be a text or a number, got \['a cat'\]."),
        ({"question": True}, "s: question must be a text or a number, got True."),
        ({"img_num": None}, "s: img_num must be a whole number, got None."),
    ],
)
def test_what_would_be_a_wrong_number_is_refused(bench, change, message):
    file = bench / "spatial_reasoning/Spatial_1_pretrained_mllm_eval.json"
    file.write_text(json.dumps({"s": {**QUESTION, **change}}))
    with pytest.raises(ValueError, match=f"Spatial_1_pretrained_mllm_eval.json, {message}"):
        load_m3_bench(bench)


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
