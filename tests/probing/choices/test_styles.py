"""Styles of asking, against RADAR's released scripts restated: one full forward a candidate, raw logits."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from mir_lightning.probing import ChoiceProbe, evaluate_choices, load_m3_bench
from tests.items import QWEN_IMAGE, item, picture
from tests.processors import build

_ROW = {"question": "What colour is the star?", "answer": "red", "distraction": ["green", "light blue"]}
# By task folder: name of its file, its questions, and the pictures of each in the order of the prompt.
BENCH = {
    "general_visual_question_answering": (
        "MMBench_object_colour_2_pretrained_mllm_eval",
        {"54": _ROW, "7": {**_ROW, "question": "Is it small? Answer:", "distraction": ["large"] * 2 + ["red"]}},
        {"54": ["object_colour/54.jpg"], "7": ["object_colour/7.jpg"]},
    ),
    "mathematical_reasoning": (
        "MathVista_2_pretrained_mllm_eval",
        {
            "12--a": {**_ROW, "question": "How many circles?", "answer": "four", "distraction": ["one", "two 3"]},
            "12--b": {**_ROW, "question": "How many? ", "answer": "2", "distraction": ["3"]},
        },
        {"12--a": ["12.jpg"], "12--b": ["12.jpg"]},
    ),
    "physical_reasoning": (
        "SeePhys_1_pretrained_mllm_eval",
        {"3--x": {**_ROW, "img_num": 2}},
        {"3--x": ["3_0.png", "3_1.png"]},
    ),
    "spatial_reasoning": (
        "Spatial_reasoning_1_pretrained_mllm_eval",
        {"s": {**_ROW, "question": "Where is it?", "answer": "to the left of it", "distraction": ["below", "on"]}},
        {"s": ["s.jpg"]},
    ),
    "Wiki_plant_identification": ("Wiki_plant", {"Q1--0": _ROW}, {"Q1--0": ["Q1.jpg"]}),
    "multiple_discipline_reasoning": (
        "MMMU_Pro_Art_4_pretrained_mllm_eval",
        {
            "v1": {**_ROW, "question": "See <image 2>, then <image 1>.", "ori_options": "['red', 'green']"},
            "v2": {"question": "Which <image 1>?", "answer": "<image 2>", "distraction": ["<image 3>"],
                   "ori_options": "['<image 2>', '<image 3>']"},
            "v3": {**_ROW, "question": "<image 1> Which?", "distraction": list("abcdef"), "ori_options": "[]"},
        },
        {"v1": ["v1_image_2", "v1_image_1"], "v2": [f"v2_image_{k}" for k in (1, 2, 3)], "v3": ["v3_image_1"]},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    root = tmp_path_factory.mktemp("m3")
    for folder, (name, rows, pictures) in BENCH.items():
        (root / folder / "images").mkdir(parents=True)
        (root / folder / f"{name}.json").write_text(json.dumps(rows))
        (root / folder / f"._{name}.json").write_bytes(b"\x00\x05\x16\x07")
        for shown in {p for each in pictures.values() for p in each}:
            path = root / folder / "images" / (shown if "." in shown else f"Art/{shown}.png")
            path.parent.mkdir(exist_ok=True)
            picture(sum(map(ord, shown))).save(path)
    return root


def _scripts_questions(script):
    """By question: prompt with ``<image>`` in it, candidates, the right one first, as the script makes them."""
    for folder, (name, rows, pictures) in BENCH.items():
        random.seed(0)
        for q_id, row in rows.items():
            shown, question = pictures[q_id], row["question"]
            answers = [row["answer"], *row["distraction"]]
            if "MMMU_Pro" in name:
                for number in (1, 2, 3):
                    question = question.replace(f"<image {number}>", "<image>")
                if "<image" in row["ori_options"]:
                    if random.random() > 0.5:
                        answers = ["A", "B"]
                    else:
                        answers = ["B", "A"]
                        shown = [shown[0], shown[2], shown[1]]
                    question += " A. <image> B. <image> Please select the correct option: "
                elif script == "llava" and len(row["distraction"]) > 1:
                    answers = [row["answer"], *random.sample(row["distraction"], 1)]
            elif script == "llava":
                before = "<image>" * len(shown)
                question = before + ("\n" if "MMBench" in name or "MathVista" in name else " ") + question
            elif script == "qwen":
                question = "<image>" * len(shown) + question
            else:
                before = "<image>\n" if "MMBench" in name or "MathVista" in name else "<image> "
                question = before * len(shown) + question
            if script == "llava":
                question += "\n"
            elif script == "qwen":
                answers = [f" {answer}" for answer in answers]
            else:
                system = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001, E501
                question = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
                question += "<|im_start|>assistant\n"
            paths = [f"{folder}/images/{p if '.' in p else f'Art/{p}.png'}" for p in shown]
            yield f"{q_id}", question, answers, paths


def _probability(model, processor, prompt, answers, images, mark):
    """Of the right answer: the tokens from the prompt's own number of tokens on, their mean logits, softmax."""
    prompt, images = prompt.replace("<image>", mark), [images]
    length = processor(text=[prompt], images=images, return_tensors="pt")["input_ids"].shape[1]
    means = []
    for answer in answers:
        inputs = processor(text=[prompt + answer], images=images, return_tensors="pt")
        ids = inputs["input_ids"][0]
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0].double()
        means.append(np.mean([logits[t - 1, ids[t]].item() for t in range(length, len(ids))]))
    return np.exp(means[0]) / np.exp(means).sum()


@pytest.mark.parametrize(
    ("style", "family"), [("llava", "llava"), ("qwen", "llava"), ("internvl", "llava"), ("qwen", "qwen2_vl")]
)
def test_each_style_gives_its_scripts_probabilities(bench, style, family):
    model, processor = build(family)
    mark = QWEN_IMAGE if family == "qwen2_vl" else processor.image_token
    if style == "qwen" and family == "llava":
        mark = f"<|vision_start|>{mark}<|vision_end|>"
    items = load_m3_bench(bench, style=style)
    result = evaluate_choices(model, ChoiceProbe(items, processor, style=style), batch_size=7)
    found = {i.id.split("/")[-1]: s.softmax(dim=0)[0].item() for i, s in zip(items, result.scores, strict=True)}
    wanted = {
        q_id: _probability(model, processor, prompt, answers, [Image.open(bench / path) for path in paths], mark)
        for q_id, prompt, answers, paths in _scripts_questions(style)
    }
    assert len(wanted) == 10
    assert found == pytest.approx(wanted, abs=1e-4)
    assert np.std(list(wanted.values())) > 0.01


def test_the_styles_differ(bench):
    model, processor = build("llava")
    means = {
        style: evaluate_choices(
            model, ChoiceProbe(load_m3_bench(bench, ["spatial_reasoning"], style=style), processor, style=style)
        ).sds
        for style in (None, "llava", "qwen", "internvl")
    }
    assert len({round(mean, 5) for mean in means.values()}) == 4


def test_a_log_probability_does_not_move_with_a_shift_of_logits_and_a_raw_logit_does():
    """What is added to all logits of a position changes no probability, but the mean of a candidate's logits."""
    model, processor = build("llava")
    probe = ChoiceProbe(
        [item("a", "What?", "red", "to the left of it", images=[picture(0)])], processor, style="llava"
    )

    def scores():
        return {score: evaluate_choices(model, probe, score).sds for score in ("logit", "logprob")}

    before = scores()
    handle = model.lm_head.register_forward_hook(lambda m, given, out: out + 2.0 * given[0][..., :1])
    after = scores()
    handle.remove()
    assert after["logprob"] == pytest.approx(before["logprob"], abs=1e-5)
    assert abs(after["logit"] - before["logit"]) > 1e-3


def test_bad_styles(bench):
    _, processor = build("llava")
    with pytest.raises(ValueError, match="style must be one of llava, qwen, internvl, got 'gpt'"):
        load_m3_bench(bench, style="gpt")
    with pytest.raises(ValueError, match="style must be one of llava, qwen, internvl, got 'gpt'"):
        ChoiceProbe([item("a", "What?", "red", "green")], processor, style="gpt")
    with pytest.raises(ValueError, match="max_distractors=1: style='llava' says how many are drawn"):
        load_m3_bench(bench, max_distractors=1, style="llava")


def test_the_fingerprint_tells_styles_apart():
    _, processor = build("llava")
    asked = [item("a", "What?", "red", "green", images=[picture(0)])]
    prints = {ChoiceProbe(asked, processor, style=style).fingerprint for style in (None, "llava", "qwen")}
    assert len(prints) == 3
