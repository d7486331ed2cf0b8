import json

import pytest

from mir_lightning import Probe


def test_a_saved_probe_gives_the_same_number(run, shared, tmp_path):
    made = run("probe", shared.root / "model", "-o", tmp_path / "probe.safetensors")
    assert made.status == 0
    arguments = ["eval", shared.root / "model", "--json", tmp_path / "out.json"]
    fresh, saved = run(*arguments), None
    first = json.loads((tmp_path / "out.json").read_text())
    saved = run(*arguments, "--probe", tmp_path / "probe.safetensors", pairs=False)
    again = json.loads((tmp_path / "out.json").read_text())
    assert saved.status == fresh.status == 0
    for key in ("mir", "layers", "source", "fingerprint"):
        assert again[key] == first[key]
    assert first["fingerprint"] in made.out
    assert Probe.load(tmp_path / "probe.safetensors")[1]["text"] == "after_vision"
    assert (tmp_path / "probe.safetensors").stat().st_mode == (tmp_path / "out.json").stat().st_mode
    for ignored in (
        ["--num", 3],
        ["--text", "after_vision"],
        ["--batch-size", "auto"],
        ["--prompt", "{image}{text}"],
    ):
        refused = run(*arguments, "--probe", tmp_path / "probe.safetensors", *ignored, pairs=False)
        assert refused.status == 1
        assert f"is as it was saved, which {ignored[0]} cannot change." in refused.err


def test_llava_format_data(run, shared, tmp_path):
    records = [
        {
            "id": f"r{i}",
            "image": f"{i}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "Noise in colour."},
            ],
        }
        for i in range(3)
    ]
    records.append({"conversations": [{"from": "human", "value": "No picture."}]})
    (tmp_path / "data.json").write_text(json.dumps(records))
    arguments = ["eval", shared.root / "model", "--data", tmp_path / "data.json", "--num", 3]
    assert "tokens    30 vision" in run(*arguments, "--image-folder", shared.root / "images", pairs=False).out
    assert "3 of 3 pairs have images that cannot be read" in run(*arguments, pairs=False).err
    outside = run(*arguments, "--image-folder", shared.root / "images" / "..", "--num", 4, pairs=False)
    assert "holds 3 records with images, 4 are needed (--num)" in outside.err


def test_lists_of_images(run, shared, tmp_path):
    """Nested folders, a text file, and question files as TextVQA's: the same pictures, the same number."""
    nested = tmp_path / "nested"
    for place in ("0.png", "b/1.png", "b/c/2.png"):
        (nested / place).parent.mkdir(parents=True, exist_ok=True)
        (nested / place).write_bytes((shared.root / "images" / place[-5:]).read_bytes())
    (nested / ".hidden").mkdir()
    (nested / ".hidden" / "0.png").write_bytes(b"no picture")
    (nested / "b" / "._1.png").write_bytes(b"no picture")
    names = [str(shared.root / "images" / f"{i}.png") for i in range(3)]
    lists = {
        "list.txt": "\n".join(names) + "\n\n",
        "paths.json": json.dumps(names),
        "llava_textvqa.jsonl": "\n".join(json.dumps({"question_id": i, "image": n}) for i, n in enumerate(names)),
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    texts, out = ["--texts", shared.root / "texts", "--num", 3], tmp_path / "out.json"
    assert run("eval", shared.root / "model", "--json", out).status == 0
    wanted = json.loads(out.read_text())
    for images in (nested, *(tmp_path / name for name in lists)):
        done = run("eval", shared.root / "model", "--images", images, *texts, "--json", out, pairs=False)
        assert done.status == 0, done.err
        found = json.loads(out.read_text())
        assert (found["source"], found["mir"]) == (wanted["source"], wanted["mir"])
    questions = tmp_path / "TextVQA_val.json"
    questions.write_text(json.dumps({"data": [{"image_id": str(i), "question": "?"} for i in range(3)]}))
    folder = tmp_path / "jpg"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes((shared.root / "images" / f"{i}.png").read_bytes())
    arguments = ["--images", questions, "--image-folder", folder, *texts, "--json", out]
    assert run("eval", shared.root / "model", *arguments, pairs=False).status == 0
    assert json.loads(out.read_text())["source"] == wanted["source"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.txt", "0.png\n", "list.txt holds 1, 3 are needed"),
        ("list.json", '{"images": []}', 'list.json must hold a list, or an object with one as its "data".'),
        ("list.json", '["0.png", 7]', 'list.json, item 1 must be a path, or an object with an "image"'),
        ("list.jsonl", '"0.png"\n{"picture": "1.png"}', 'line 2 must be a path, or an object with an "image"'),
        (
            "list.json",
            '[{"image_id": null}]',
            'or an object with an "image" or "image_id", got {\'image_id\': None}',
        ),
        ("list.csv", "0.png", "images must be a folder, or a list in a .txt, .json or .jsonl file, got"),
    ],
)
def test_bad_lists_of_images(run, shared, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    arguments = ["--images", tmp_path / name, "--texts", shared.root / "texts", "--num", 3]
    done = run("eval", shared.root / "model", *arguments, pairs=False)
    assert (done.status, message in done.err) == (1, True), done.err


def test_unreadable_images_are_named_and_counted(run, shared, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for source in (shared.root / "images").iterdir():
        (images / source.name).write_bytes(source.read_bytes())
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:300])
    arguments = ["eval", shared.root / "model", "--images", images, "--texts", shared.root / "texts", "--num", 3]
    done = run(*arguments, pairs=False)
    assert done.status == 1
    assert "1 of 3 pairs have images that cannot be read, more than --max-unreadable 0.01 allows" in done.err
    done = run(*arguments, "--max-unreadable", 0.4, pairs=False)
    assert done.status == 0
    assert f"left out: {images / '1.png'}: image file is truncated" in done.err
    assert "tokens    20 vision" in done.out


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_draws_other_pairs(run, shared, tmp_path, seed):
    sources = set()
    for arguments in (["--num", 2], ["--num", 2, "--seed", seed], ["--num", 2, "--seed", seed]):
        assert (
            run(
                "eval",
                shared.root / "model",
                *arguments,
                "--images",
                shared.root / "images",
                "--texts",
                shared.root / "texts",
                "--json",
                tmp_path / "out.json",
                pairs=False,
            ).status
            == 0
        )
        sources.add(json.loads((tmp_path / "out.json").read_text())["source"])
    assert len(sources) == 2


def test_half_a_character_in_data_is_named(run, shared, tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "\ud83d"}]
    records = [{"image": f"{i}.png", "conversations": turns[: i + 1]} for i in (0, 1)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    source = ["--data", tmp_path / "data.json", "--image-folder", shared.root / "images"]
    assert run("eval", shared.root / "model", *source, "--num", 1, pairs=False).status == 0
    refused = run("eval", shared.root / "model", *source, "--num", 2, pairs=False)
    assert f"{tmp_path / 'data.json'}, record 1 holds half of a character" in refused.err
