"""``mir-lightning sds``: the engine's number, by ability and task."""

import csv
import json

import pytest

from mir_lightning.probing import ChoiceProbe, evaluate_choices, load_choice_items, load_m3_bench

ROW = {"question": "What is it?", "answer": "a cat", "distractors": ["a dog", "a bird"], "task": "animals"}


@pytest.fixture
def items(shared, tmp_path):
    rows = [{**ROW, "ability": "perception", "image": str(shared.root / "images" / f"{i}.png")} for i in range(3)]
    rows.append({**ROW, "task": "counting", "ability": "reasoning", "answer": 3, "image": rows[0]["image"]})
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "items.jsonl"


def test_the_engines_number_in_every_output(run, shared, items, tmp_path):
    files = ["--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv"]
    arguments = ["--items", items, "--score", "logprob", "--template", r"Q: {prompt}\nA:", *files]
    done = run("sds", shared.root / "model", *arguments, pairs=False)
    assert done.status == 0, done.err
    probe = ChoiceProbe(load_choice_items(items), shared.processor, "Q: {prompt}\nA:")
    wanted = evaluate_choices(shared.model.eval(), probe, "logprob")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["sds"] == pytest.approx(wanted.sds, abs=1e-5)
    assert (written["score"], written["style"], written["fingerprint"]) == ("logprob", None, probe.fingerprint)
    assert written["scores"]["line 1"] == pytest.approx(wanted.scores[0].tolist(), abs=1e-4)
    assert written["breakdown"]["reasoning/counting"]["items"] == 1
    assert f"SDS {wanted.sds:.4f} (logprobs, own style; higher is better)" in done.out
    lines = [line.split() for line in done.out.splitlines()[1:]]
    assert lines[0] == ["of", "SDS", "accuracy", "chance", "items"]
    assert [line[0] for line in lines[1:]] == [
        "all",
        "perception",
        "perception/animals",
        "reasoning",
        "reasoning/counting",
    ]
    with (tmp_path / "out.csv").open() as file:
        assert float(list(csv.DictReader(file))[1]["SDS"]) == pytest.approx(
            wanted.breakdown["perception"].sds, abs=1e-5
        )


def test_a_style_asks_m3_bench_as_its_script_does(run, shared, tmp_path):
    folder = tmp_path / "m3" / "multiple_discipline_reasoning"
    (folder / "images").mkdir(parents=True)
    row = {"question": "<image 1> Which?", "answer": "red", "distraction": list("abcdef"), "ori_options": "[]"}
    (folder / "MMMU_Pro_Art.json").write_text(json.dumps({f"v{i}": row for i in range(3)}))
    for i in range(3):
        (folder / "images" / f"v{i}_image_1.png").write_bytes((shared.root / "images" / f"{i}.png").read_bytes())
    done = run(
        "sds", shared.root / "model", "--items", tmp_path / "m3", "--style", "llava",
        "--json", tmp_path / "out.json", pairs=False,
    )  # fmt: skip
    assert done.status == 0, done.err
    probe = ChoiceProbe(load_m3_bench(tmp_path / "m3", style="llava"), shared.processor, style="llava")
    assert [len(item.candidates) for item in probe.items] == [2, 2, 2]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["sds"] == pytest.approx(evaluate_choices(shared.model.eval(), probe).sds, abs=1e-5)
    assert written["style"] == "llava"
    assert "(logits, llava style; higher is better)" in done.out


def test_bad_options(run, shared, items, tmp_path):
    for arguments, message in (
        (["--items", tmp_path / "none.jsonl"], "items must be an M3-Bench folder or a .jsonl file, got"),
        (["--items", items, "--template", "Q:"], "template must hold {prompt}, got 'Q:'"),
        (
            ["--items", tmp_path, "--style", "llava", "--max-distractors", 1],
            "style='llava' says how many are drawn",
        ),
        (["--items", items, "--json", items], "is a file of items as well; it would be overwritten"),
    ):
        done = run("sds", shared.root / "model", *arguments, pairs=False)
        assert (done.status, message in done.err) == (1, True), done.err
