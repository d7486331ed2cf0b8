import subprocess
import sys
import zipfile
from pathlib import Path

import yaml
from hatchling.builders.wheel import WheelBuilder

from mir_lightning.cli.pretrain import recipe_folder

ROOT = Path(__file__).parents[2]


def _command(*arguments, folder):
    return subprocess.run(
        [sys.executable, "-m", "mir_lightning", *arguments], capture_output=True, text=True, cwd=folder
    )


def test_a_shipped_config_by_name_and_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("trainer: {max_steps: 5}")
    run = _command(
        "pretrain", "fit", "--config", "demo", "--config=schedules/mlp_only", "--config", "mine.yaml",
        "--print_config", folder=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    config = yaml.safe_load(run.stdout)
    assert config["trainer"]["max_steps"] == 5
    assert config["model"]["stages"][0]["train"][0]["lr"] == 1e-3
    assert config["data"]["system"] == "You describe pictures."
    assert run.stderr.startswith("loading PyTorch")


def test_a_config_that_is_not_there(tmp_path):
    run = _command("pretrain", "fit", "--config", "dmeo", folder=tmp_path)
    assert run.returncode == 2
    assert "--config dmeo: no such file, and none of the shipped: demo, " in run.stderr
    assert "loading" not in run.stderr


def test_version(tmp_path):
    run = _command("--version", folder=tmp_path)
    assert run.stdout.startswith("mir-lightning 0.")


def test_the_wheel_holds_recipe_and_configs_where_the_command_looks(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    folder = recipe_folder()
    shipped = [folder / "llava_pretrain.py", *folder.glob("configs/**/*.yaml")]
    assert len(shipped) > 9
    assert {f"mir_lightning/recipes/{file.relative_to(folder).as_posix()}" for file in shipped} <= names
    assert not any("__pycache__" in name for name in names)
    assert "mir_lightning/page.html" in names
