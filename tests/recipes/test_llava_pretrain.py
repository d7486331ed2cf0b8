"""The recipe as a user runs it, with the packaged real weights."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from mir_lightning.llava.demo.weights import build_packaged_processor
from mir_lightning.llava.model.backbones import ModelSource, build_processor
from mir_lightning.llava.model.saving import load_vlm
from recipes.llava_pretrain import main
from tests.processors import save_qwen2_vl
from tests.recipes.runs import curves_of, small_config, start

ROOT = Path(__file__).parents[2]
DEMO, UNFROZEN = (str(ROOT / "recipes" / "configs" / f"{name}.yaml") for name in ("demo", "demo_unfrozen"))
SMALL = [
    "--data.batch_size=2",
    "--data.shapes_choices=1",
    "--data.probe_size=4",
    "--captions.max_new_tokens=4",
    "--checkpoint.save_top_k=0",
    "--mir.every_n_steps=1",
    "--trainer.max_steps=2",
]


def _recipe(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "llava_pretrain.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


@pytest.mark.slow
@pytest.mark.parametrize("config", [DEMO, UNFROZEN])
def test_two_steps_leave_table_pictures_numbers_and_a_loadable_model(tmp_path, config):
    override = tmp_path / "more.yaml"
    override.write_text(yaml.safe_dump({"trainer": {"precision": "32-true", "default_root_dir": "elsewhere"}}))
    run = _recipe("fit", "--config", config, "--config", str(override), *SMALL, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines() if line]
    header = lines.index(["step", "held-out", "loss", "perplexity", "MIR", "robust", "image", "gain", "error"])
    steps = [line[0] for line in lines[header + 1 : header + 4]]
    assert steps == ["0", "1", "2"]
    named = {line[0]: line[-1] for line in lines[header + 4 :]}
    pictures = [Path(tmp_path / line[1]) for line in lines if line[0] == "picture"]
    assert [p.name for p in pictures] == ["overview.png", "curves.png", "heatmap.png"]
    assert all(p.stat().st_size > 5000 for p in pictures)
    assert {path.name for path in tmp_path.iterdir()} == {
        "more.yaml",
        "elsewhere",
    }
    said = run.stderr.splitlines()
    assert said[0] == "loading PyTorch, Lightning and Transformers"
    assert "precision  32-true: as asked for" in said
    assert any(line.startswith("memory     ") and "GB a device: weights 0.6" in line for line in said)
    assert any("MIR at step 1: 100%" in line for line in said)
    with (tmp_path / named["numbers"]).open() as file:
        mir = [row["mir"] for row in csv.DictReader(file) if row["mir"]]
    assert [f"{float(value):.3f}" for value in mir] == [line[3] for line in lines[header + 1 : header + 4]]
    assert all(float(line[6]) > 0 for line in lines[header + 2 : header + 4]), "the gain's error"
    assert f"wandb sync {named['W&B']}" in run.stdout
    assert (tmp_path / named["W&B"]).is_dir()

    import mir_lightning.llava.demo.weights  # noqa: F401

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / named["model"])
    assert AutoProcessor.from_pretrained(tmp_path / named["model"]).image_token_id == model.config.image_token_id


@pytest.mark.slow
def test_a_family_with_a_video_processor_is_trained_and_saved_without_torchvision(tmp_path):
    build_packaged_processor().save_pretrained(tmp_path / "tokens")
    save_qwen2_vl(tmp_path / "vlm", tmp_path / "tokens")
    config = small_config(tmp_path / "vlm", tmp_path)
    config["trainer"] |= {"max_epochs": 1, "max_steps": 2}
    config["model"]["stages"][0]["steps"] = 1
    run = start(tmp_path, config)
    assert run.returncode == 0, run.stderr
    curves = curves_of(tmp_path)
    assert {name for name, _ in curves} == {"train/loss", "mir", "mir_probe/loss"}
    assert {step for name, step in curves if name == "mir"} == {0, 2}
    processor = build_processor(ModelSource(vlm=str(tmp_path / "model")))
    assert processor.image_token_id == load_vlm(str(tmp_path / "model")).config.image_token_id
    saved = json.loads((tmp_path / "model" / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen2VLProcessor"
    assert saved["video_processor"] == json.loads(
        (tmp_path / "vlm" / "video_preprocessor_config.json").read_text()
    )


def _ended(*arguments):
    """The exit code of a command that runs nothing."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code


def test_print_config_of_several_files_is_the_run_that_would_start(capsys):
    assert _ended("fit", "--config", DEMO, "--config", UNFROZEN, "--trainer.max_steps=4", "--print_config") == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["max_steps"] == 4
    assert [part["lr"] for part in config["model"]["stages"][0]["train"]] == [3e-4, 3e-5]
    assert config["mir"]["probe"] == {"images": None, "texts": None}


def test_help_tells_what_the_options_do(capsys):
    assert _ended("fit", "--help") == 0
    said = capsys.readouterr().out
    for text in (
        "--mir.every_n_steps",
        "optimizer steps between evaluations",
        "what trains when",
    ):
        assert text in said


def test_a_config_key_that_does_not_exist_is_named(capsys):
    assert _ended("fit", "--config", DEMO, "--model.projector_rate=1") == 2
    assert "projector_rate" in capsys.readouterr().err
