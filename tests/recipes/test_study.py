import csv
import re

import pytest
import yaml

from recipes.study import Study, read_table, write_table
from tests.recipes.runs import ROOT

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
    runs = list(Study.read(study_file(tmp_path)).runs())
    assert [run.name for run in runs] == ["base-0", "slow-0", "fast-0", "base-1", "slow-1", "fast-1"]
    assert [run.factor for run in runs[:3]] == ["base", "rate", "rate"]
    assert [run.name for run in Study.read(study_file(tmp_path)).runs(["fast"])] == ["fast-0", "fast-1"]


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
        Study.read(study_file(tmp_path, **changes))


def test_a_table_is_read_as_it_was_written_and_grows_columns(tmp_path):
    file = tmp_path / "study.csv"
    assert read_table(file) == []
    write_table(file, [{"run": "a-0", "mir": 1 / 3}])
    rows = [*read_table(file), {"run": "b-0", "mir": 2.0, "score": 0.5}]
    write_table(file, rows)
    assert list(csv.reader(file.open())) == [["run", "mir", "score"], ["a-0", "0.333333", ""], ["b-0", "2", "0.5"]]


def test_the_shipped_study_is_as_large_as_it_says():
    runs = list(Study.read(STUDY / "study.yaml").runs())
    assert len({run.configuration for run in runs}) == 27
    assert len(runs) == 81
    assert len(list(Study.read(STUDY / "controls.yaml").runs())) == 18
    assert re.search("27 configurations", (STUDY / "study.yaml").read_text())
