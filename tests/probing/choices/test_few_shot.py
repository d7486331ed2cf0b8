import numpy as np
import pytest
import torch

from mir_lightning.probing.choices.few_shot import (
    FewShotProbe,
    evaluate_few_shot,
    token_f1,
)
from mir_lightning.probing.choices.probe import made_of
from tests.items import QWEN_IMAGE, item, open_items, picture
from tests.processors import build


@pytest.mark.parametrize(
    ("answer", "right", "f1"),
    [
        ("red", "red", 1.0),
        ("The red, star.", "a Red star", 1.0),
        ("red star", "red cross", 0.5),
        ("red red star", "red", 0.5),
        ("blue", "red", 0.0),
        ("", "red", 0.0),
        ("two small red circles", "two large circles", 4 / 7),
    ],
)
def test_f1_counts_words(answer, right, f1):
    assert token_f1(answer, right) == pytest.approx(f1)


def test_examples_are_seeded_solved_and_of_the_same_task():
    _, processor = build("llava")
    items = open_items(3) + open_items(3, "vqa")
    examples = open_items(10) + open_items(10, "vqa")
    probe = FewShotProbe(items, examples, processor, shots=(0, 4))
    assert probe.probes[0].items == items
    again = FewShotProbe(items, examples, processor, shots=(0, 4))
    assert probe.fingerprint == again.fingerprint
    assert probe.fingerprint != FewShotProbe(items, examples, processor, shots=(0, 4), seed=1).fingerprint
    for shown, asked in zip(probe.probes[4].items, items, strict=True):
        *lines, last = shown.prompt.split("\n")
        assert last == asked.prompt
        assert len(lines) == len(set(lines)) == 4
        numbers = [int(line.rsplit(" ", 1)[1]) for line in lines]
        assert lines == [f"{asked.prompt} answer {number}" for number in numbers]
        assert [image.tobytes() for image in shown.images[:4]] == [picture(n).tobytes() for n in numbers]
        assert shown.images[4] is asked.images[0]
        assert asked.id not in {f"{asked.task}{number}" for number in numbers}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "idefics3"])
def test_answers_are_those_of_generate(family):
    model, processor = build(family)
    mark = QWEN_IMAGE if family == "qwen2_vl" else processor.image_token
    items = open_items(2) + open_items(2, "vqa")
    probe = FewShotProbe(
        items, open_items(4, first=9) + open_items(4, "vqa", 9), processor, (0, 2), image_text=mark
    )
    result = evaluate_few_shot(model, probe, max_new_tokens=6, batch_size=3)
    for count, shown in probe.probes.items():
        for asked, answer in zip(shown.items, result.answers[count], strict=True):
            text = asked.prompt.replace("<image>", mark)
            inputs = processor(text=[text], images=[list(asked.images)], return_tensors="pt")
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[
                    0, inputs["input_ids"].shape[1] :
                ]
            wanted = processor.tokenizer.decode(ids, skip_special_tokens=True).strip().split("\n")[0]
            assert answer == wanted, (count, asked.id)


def test_scores_are_means_over_answers_and_tasks():
    model, processor = build("llava")
    examples = open_items(4, first=9) + open_items(4, "vqa", 9)
    items = open_items(3) + open_items(2, "vqa")
    written = evaluate_few_shot(model, FewShotProbe(items, examples, processor, (0,)), 3).answers[0]
    right = [
        item(a.id, a.prompt, w or "x", "wrong", images=a.images, task=a.task)
        for a, w in zip(items, written, strict=True)
    ]
    asked = [right[0], *items[1:]]  # one answer is what the model writes
    found = evaluate_few_shot(model, FewShotProbe(asked, examples, processor, (0, 1)), 3)
    by_task = {"caption": (0, 3), "vqa": (3, 5)}
    for task, (start, end) in by_task.items():
        f1 = [token_f1(w, a.answer) for w, a in zip(written[start:end], asked[start:end], strict=True)]
        assert found.scores[0][task].f1 == pytest.approx(np.mean(f1))
    assert found.scores[0]["caption"].exact_match == pytest.approx(1 / 3)
    assert found.scores[0][""].exact_match == pytest.approx(1 / 6)
    assert set(found.scores) == {0, 1}


def test_leaves_no_trace():
    model, processor = build("llava")
    model.train()
    rng = torch.get_rng_state()
    evaluate_few_shot(model, FewShotProbe(open_items(2), open_items(3, first=5), processor, (1,)), 2)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


def test_bad_arguments():
    model, processor = build("llava")
    with pytest.raises(ValueError, match="examples: task 'caption' has 3, 4 shots were asked for"):
        FewShotProbe(open_items(2), open_items(3, first=5), processor)
    for shots in ((), (0, -1)):
        with pytest.raises(ValueError, match="shots must be numbers from 0 on, at least one, got"):
            FewShotProbe(open_items(2), [], processor, shots)
    probe = FewShotProbe(open_items(2), [], processor, (0,))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        evaluate_few_shot(model, probe, 0)
    with pytest.raises(TypeError, match="items must be a FewShotProbe or a callable that makes one, got list"):
        made_of(FewShotProbe, open_items(2))
