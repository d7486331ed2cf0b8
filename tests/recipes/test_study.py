import csv
import math
import re
import shutil

import pytest
import torch
import yaml

from mir_lightning.llava.model.saving import load_vlm
from recipes.llava_pretrain import main as recipe
from recipes.study import StudyPlan, main, read_table, train_and_read, write_table
from tests.models import save_tiny_llava
from tests.recipes.runs import ROOT, small_config

STUDY = ROOT / "recipes" / "configs" / "study"


def study_file(folder, **changes):
    for name in ("pretrain", "finetune"):
        (folder / f"{name}.yaml").write_text("{}")
    found = {
        "pretrain": "pretrain.yaml",
        "finetune": "finetune.yaml",
        "score": "answers/em_0",
        "seeds": {0: {}, 1: {}},
        "factors": {"base": {"base": {}}, "rate": {"slow": {}, "fast": {}}},
        **changes,
    }
    (file := folder / "study.yaml").write_text(
        yaml.safe_dump({k: v for k, v in found.items() if v is not None}, sort_keys=False)
    )
    return file


def test_every_seed_of_every_configuration_is_a_run(tmp_path):
    runs = list(StudyPlan.read(study_file(tmp_path)).runs())
    assert [run.name for run in runs] == ["base-0", "slow-0", "fast-0", "base-1", "slow-1", "fast-1"]
    assert [run.factor for run in runs[:3]] == ["base", "rate", "rate"]
    assert [run.name for run in StudyPlan.read(study_file(tmp_path)).runs(["fast"])] == ["fast-0", "fast-1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": None}, "must hold pretrain, finetune, seeds, factors, score, it holds"),
        ({"seeds": {}}, "seeds must be a dict that is not empty"),
        ({"factors": {"a": {"x": {}}, "b": {"x": {}}}}, "factors name x twice"),
        ({"pretrain": "other.yaml"}, "pretrain must be a config of the recipe, there is no"),
    ],
)
def test_a_study_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        StudyPlan.read(study_file(tmp_path, **changes))


def test_a_table_is_read_as_it_was_written_and_grows_columns(tmp_path):
    file = tmp_path / "study.csv"
    assert read_table(file) == []
    write_table(file, [{"run": "a-0", "mir": 1 / 3}])
    rows = [*read_table(file), {"run": "b-0", "mir": 2.0, "score": 0.5}]
    write_table(file, rows)
    assert list(csv.reader(file.open())) == [["run", "mir", "score"], ["a-0", "0.333333", ""], ["b-0", "2", "0.5"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["study", "controls"])
def test_every_shipped_configuration_parses(tmp_path, capsys, name):
    study = StudyPlan.read(STUDY / f"{name}.yaml")
    for run in (run for run in study.runs() if run.seed == 0):
        files = [study.pretrain]
        for number, change in enumerate(run.changes):
            files.append(tmp_path / f"{run.configuration}-{number}.yaml")
            files[-1].write_text(yaml.safe_dump(dict(change)))
        options = [part for file in files for part in ("--config", str(file))]
        with pytest.raises(SystemExit, match="0"):
            recipe(["fit", *options, "--print_config"])
        assert yaml.safe_load(capsys.readouterr().out)["data"]["probe_size"] == 32, run.name


def test_the_shipped_study_is_as_large_as_it_says():
    runs = list(StudyPlan.read(STUDY / "study.yaml").runs())
    assert len({run.configuration for run in runs}) == 24
    assert len(runs) == 72
    assert len(list(StudyPlan.read(STUDY / "controls.yaml").runs())) == 18
    assert re.search("24 configurations", (STUDY / "study.yaml").read_text())


@pytest.fixture
def small_study(tmp_path, tiny_processor):
    """Of a tiny LLaVA: five steps on shapes, then five more, and controls."""
    vlm = save_tiny_llava(tmp_path / "vlm", tiny_processor)
    data = {"shapes_choices": 1, "caption_pictures": 0, "probe_size": 8, "gain_samples": 8}
    pretrain = small_config(vlm, tmp_path, data=data)
    pretrain["trainer"]["max_epochs"] = 1
    pretrain["trainer"]["logger"]["init_args"]["save_dir"] = "default_root_dir"
    pretrain["mir"] = {"every_n_steps": 5, "at_start": False}
    pretrain["image_gain"] = pretrain["sds"] = {"at_start": False}
    finetune = {**pretrain, "data": {**pretrain["data"], "answers": 2, "gain_samples": 0, "shapes_choices": 0}}
    finetune["mir"] = {"every_n_steps": None, "at_start": False, "at_end": False}
    finetune["answers"] = {"max_new_tokens": 2}

    def fault(name, **options):
        return {"trainer": {"callbacks": [{"class_path": f"recipes.controls.{name}", "init_args": options}]}}

    rate = {"model": {"stages": [{"train": [{"module": "projector", "lr": 0.1}]}]}}
    controls = {
        "constant": fault("Planted", fault="constant"),
        "loud": fault("Scaled", factor=10),
        "mir_loss": fault("MIRLoss"),
    }
    file = study_file(
        tmp_path,
        seeds={0: {"seed_everything": 0}, 1: {"seed_everything": 1}},
        factors={"base": {"base": {}}, "rate": {"fast": rate}, "control": controls},
    )
    for name, config in (("pretrain", pretrain), ("finetune", finetune)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return file


def test_runs_are_read_at_every_point_scored_and_not_done_again(small_study, tmp_path, monkeypatch, capsys):
    root = tmp_path / "study"
    monkeypatch.setattr("sys.argv", ["study", str(small_study), str(root), "--only", "base", "fast"])
    monkeypatch.setattr("recipes.study.ProcessPoolExecutor", Here)
    main()
    rows = read_table(root / "study.csv")
    assert [(row["run"], row["factor"], row["step"]) for row in rows] == [
        ("base-0", "base", "5"),
        ("fast-0", "rate", "5"),
        ("base-1", "base", "5"),
        ("fast-1", "rate", "5"),
    ]
    for name in ("mir", "mir_gap/mean", "image_gain", "mir_probe/loss", "sds", "score/colour"):
        assert all(math.isfinite(float(row[name])) for row in rows), name
    assert not [
        name
        for name in rows[0]
        if "layer_" in name
        or name.startswith(("train", "sds_chance"))
        or "overhead" in name
        or name.endswith("_se")
    ]
    assert rows[0]["mir"] != rows[1]["mir"]
    assert not list(root.glob("*/*/model"))
    assert not list(root.glob("*/*/checkpoints"))
    shutil.rmtree(root / "base-0")
    capsys.readouterr()
    main()
    assert capsys.readouterr().out.startswith("4 runs, 4 done\n")
    assert not (root / "base-0").exists()


def test_a_run_that_fails_is_named_and_the_others_go_on(small_study, tmp_path, monkeypatch, capsys):
    found = yaml.safe_load(small_study.read_text())
    found["factors"]["rate"] = {"broken": {"model": {"parts": ["nowhere.safetensors"]}}}
    found["seeds"] = {0: {}}
    small_study.write_text(yaml.safe_dump(found, sort_keys=False))
    root = tmp_path / "study"
    monkeypatch.setattr("sys.argv", ["study", str(small_study), str(root), "--only", "broken", "base"])
    monkeypatch.setattr("recipes.study.ProcessPoolExecutor", Here)
    with pytest.raises(SystemExit, match="failed, the same command tries again: broken-0"):
        main()
    assert "broken-0 failed: ValueError: parts: nowhere.safetensors cannot be read" in capsys.readouterr().out
    assert [row["run"] for row in read_table(root / "study.csv")] == ["base-0"]


@pytest.mark.slow
def test_controls_spoil_training_alone(small_study, tmp_path, monkeypatch):
    """What is made loud is the base made loud; a model that learns MIR has a lower one, and not the texts."""
    kept = {}
    monkeypatch.setattr("recipes.study.shutil.rmtree", lambda folder, **_: kept.setdefault(str(folder), folder))
    runs = {run.configuration: run for run in StudyPlan.read(small_study).runs() if run.seed == 0}
    rows = {name: train_and_read(runs[name], tmp_path, 1)[-1] for name in ("base", "loud", "constant", "mir_loss")}
    models = {name: load_vlm(str(tmp_path / f"{name}-0" / "pretrain" / "model")).state_dict() for name in rows}
    name = next(name for name in models["base"] if name.endswith("multi_modal_projector.linear_2.weight"))
    assert torch.equal(models["loud"][name], 10 * models["base"][name])
    assert rows["loud"]["mir_norm/mean"] > 2 * rows["base"]["mir_norm/mean"]
    assert rows["mir_loss"]["mir"] < rows["base"]["mir"]
    assert rows["mir_loss"]["mir_probe/loss"] > rows["base"]["mir_probe/loss"]
    assert rows["constant"]["image_gain"] != rows["base"]["image_gain"]


class Here:
    """A pool of this process."""

    def __init__(self, workers, context):
        self.workers = workers

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *given):
        from concurrent.futures import Future

        done = Future()
        try:
            done.set_result(work(*given))
        except Exception as error:
            done.set_exception(error)
        return done
