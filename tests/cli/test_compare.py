import csv
import json

import pytest
import torch
from PIL import Image

from mir_lightning.functional.influence import standard_error


@pytest.fixture
def results(run, shared, tmp_path):
    files = []
    for name, variant in (("model", "paper"), ("other", "paper"), ("other", "official")):
        files.append(tmp_path / f"{name}-{variant}.json")
        arguments = ["--variant", variant, "--json", files[-1], "--no-progress"]
        assert run("eval", shared.root / name, *arguments).status == 0
    return files


def test_a_table_sorted_by_mir_and_one_picture(run, shared, results, tmp_path):
    table, plot = tmp_path / "table.csv", tmp_path / "curves.png"
    done = run("compare", *results[:2], "--csv", table, "--plot", plot, pairs=False)
    assert done.status == 0
    records = {json.loads(file.read_text())["mir"]: file.stem.split("-")[0] for file in results[:2]}
    expected = [records[mir] for mir in sorted(records)]
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == expected
    rows = list(csv.DictReader(table.open()))
    assert [row["model"] for row in rows] == expected
    assert float(rows[0]["mir"]) == min(records)
    with Image.open(plot) as picture:
        assert picture.width > 400
    models = run("compare", shared.root / "other", results[0], "--json", tmp_path / "all.json")
    assert models.out == done.out
    assert [record["mir"] for record in json.loads((tmp_path / "all.json").read_text())] == sorted(records)


def test_what_is_not_comparable_is_refused(run, shared, results, tmp_path):
    done = run("compare", results[0], results[2], pairs=False)
    assert done.status == 1
    assert "not comparable: variant " in done.err
    assert run("compare", results[0], results[2], "--allow-different", pairs=False).status == 0
    probe = json.loads(results[0].read_text())["source"]
    nearly = json.loads(results[1].read_text()) | {"source": probe[:12] + probe[12:][::-1]}
    results[1].write_text(json.dumps(nearly))
    assert f"not comparable: probe {probe[:12]} (" in run("compare", *results[:2], pairs=False).err
    other_probe = json.loads(results[1].read_text()) | {"source": "somewhere else"}
    results[1].write_text(json.dumps(other_probe))
    assert "not comparable: probe" in run("compare", *results[:2], pairs=False).err
    for name, content, message in (("a.json", "{", "is not JSON"), ("b.json", "[]", "is no result")):
        (tmp_path / name).write_text(content)
        assert message in run("compare", tmp_path / name, pairs=False).err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "layers must be a list of one or more"),
        ({"model": None}, "model must be a text"),
        ({"mir": "low"}, "mir must be a number within 1e+300, got 'low'"),
        ({"mir": 10**400}, "mir must be a number within 1e+300, got 1000"),
        ({"mir_robust": float("nan")}, "mir_robust must be a number within 1e+300, got nan"),
        ({"layers": [1e308]}, "layers[0] must be a number within 1e+300, got 1e+308"),
        ({"effective_rank": [[1.0]]}, "effective_rank[0] must be a list of 2"),
        ({"norm_ratio": [1.0]}, "norm_ratio must be a list of "),
        ({"standard_error": "small"}, "standard_error must be a number within 1e+300, got 'small'"),
        ({"influence": [float("inf")]}, "influence[0] must be a number within 1e+300, got inf"),
        ({"influence": []}, "influence must be a list of one or more"),
        ({"vision_tokens": "many"}, "vision_tokens must be a whole number"),
    ],
)
def test_damaged_results_are_named_with_the_field(run, results, change, message):
    results[0].write_text(json.dumps(json.loads(results[0].read_text()) | change))
    done = run("compare", results[0], pairs=False)
    assert done.status == 1
    assert f'{results[0]} is no result of "mir-lightning eval --json": {message}' in done.err


def test_names_are_shown_as_they_are(run, results, tmp_path, monkeypatch):
    """Neither as mathematics, nor as markup, nor hidden for a leading underscore, nor failing at half a letter."""
    names = ["$a_{1}$", "_b[red]", r"half\ud800"]
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, place: figures.append(figure))
    for name, file in zip(names, results, strict=False):
        model = f"models/{name}".replace(r"\ud800", "\ud800")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model": model, "variant": "paper"}))
    files = ["--plot", tmp_path / "curves.png", "--csv", tmp_path / "table.csv"]
    done = run("compare", *results, *files, pairs=False)
    assert sorted(line.split()[0] for line in done.out.splitlines()[1:]) == names
    assert sorted(row["model"] for row in csv.DictReader((tmp_path / "table.csv").open())) == names
    texts = figures[0].axes[0].get_legend().get_texts()
    shown = sorted(text._preprocess_math(text.get_text()) for text in texts)
    assert not any(math for _, math in shown)
    assert [text.split(" (MIR")[0] for text, _ in shown] == names


def test_options_that_results_would_ignore_are_refused(run, shared, results):
    done = run("compare", *results[:2], "--num", 3, "--device-map", "auto", "--no-progress", pairs=False)
    assert done.status == 1
    assert "--device-map, --num cannot change results: there is no model to evaluate" in done.err
    assert run("compare", results[0], results[0].rename(results[0].with_suffix(".JSON")), pairs=False).status == 1
    assert run("compare", results[1], results[0].with_suffix(".JSON"), pairs=False).status == 0


@pytest.fixture
def change(results):
    """Write other values into a result's file, or take values out of it."""

    def write(index, without=(), **values):
        record = json.loads(results[index].read_text()) | values
        results[index].write_text(json.dumps({k: v for k, v in record.items() if k not in without}))

    return write


def test_differences_are_paired(run, shared, results, change, tmp_path):
    influences = [0.02, -0.01, 0.0], [0.021, -0.01, 0.001]
    for index, (mir, influence) in enumerate(zip((1.5, 1.2), influences, strict=True)):
        change(index, mir=mir, influence=influence, standard_error=0.01 * (index + 1))
    done = run("compare", *results[:2], "--csv", tmp_path / "table.csv", pairs=False)
    half = 1.96 * standard_error(torch.tensor(influences[0]) - torch.tensor(influences[1])).item()
    assert done.out.splitlines()[-1] == f"model - other: +0.3000 ± {half:.4f} (95 %, paired over 3 samples)"
    assert [line.split()[:3] for line in done.out.splitlines()[:2]] == [
        ["model", "mir", "±"],
        ["other", "1.2000", "0.0392"],
    ]
    assert [float(row["±"]) for row in csv.DictReader((tmp_path / "table.csv").open())] == [0.0392, 0.0196]
    change(0, mir=1.2001)
    assert run("compare", *results[:2], pairs=False).out.endswith("3 samples): smaller than its noise\n")
    change(0, influence=[0.1, 0.2])
    assert (
        "not paired, as their influences are of 2 and 3 samples" in run("compare", *results[:2], pairs=False).out
    )
    change(0, source="elsewhere")
    done = run("compare", *results[:2], "--allow-different", pairs=False)
    assert done.out.endswith("model - other: not paired, as they differ in probe\n")
    change(0, influence=None, without=("standard_error",), source=json.loads(results[1].read_text())["source"])
    done = run("compare", *results[:2], pairs=False)
    assert "model - other" not in done.out
    assert done.out.splitlines()[2].split()[:2] == ["model", "1.2001"]
    refused = run("compare", "a model", *results[:2], "--interval")
    assert f'--interval: {results[0]} holds no influences; "mir-lightning eval --interval" does.' in refused.err


def test_models_are_evaluated_with_their_interval(run, shared, results, change, tmp_path):
    done = run(
        "compare", shared.root / "model", shared.root / "other", "--interval", "--json", tmp_path / "a.json"
    )
    assert "(95 %, paired over 3 samples)" in done.out
    assert all(len(record["influence"]) == 3 for record in json.loads((tmp_path / "a.json").read_text()))


def test_older_results_have_fewer_fields(run, results, change):
    change(0, without=("standard_error", "influence", "norm_ratio", "mir_equal_norm", "rank_order"))
    done = run("compare", *results[:2], pairs=False)
    assert done.status == 0
    assert "±" not in done.out
    assert "the ranks are of different orders (--rank-order)" in done.out
