"""Kill the recipe, and start the same command again: nothing of the run may differ."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.models import tiny_llava

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory, tiny_processor):
    """A tiny LLaVA with dropout, so that a lost random state would show."""
    folder = tmp_path_factory.mktemp("vlm")
    model = tiny_llava(
        dropout=0.2, vocab_size=len(tiny_processor.tokenizer), image_token=tiny_processor.image_token_id
    )
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


def _config(vlm, folder, *strikes):
    parts = [{"module": "projector", "lr": 1e-3}, {"module": "llm", "lr": 1e-3}]
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "default_root_dir": str(folder),
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "csv"},
            },
            "callbacks": [
                {
                    "class_path": "tests.recipes.interruptions.StruckAt",
                    "init_args": {"step": s, "signal_name": name},
                }
                for s, name in strikes
            ],
        },
        "model": {
            "source": {"vlm": str(vlm)},
            "stages": [{"train": parts[:1], "steps": 3}, {"train": parts}],
        },
        "data": {"batch_size": 2, "global_batch_size": 4, "data_scale": 20, "probe_size": 4, "num_workers": 1},
        "mir": {"every_n_steps": 2},
        "restart": {"every_n_train_steps": 2},
    }


def _start(tmp_path, config):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "llava_pretrain.py"), "fit", "--config", str(file)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def _curves(folder):
    """Loss and MIR by step; where a step was run again, all its values."""
    curves = {}
    for file in sorted(folder.glob("csv/version_*/metrics.csv")):
        for row in csv.DictReader(file.open()):
            for name in ("train/loss", "mir", "mir_probe/loss"):
                if row.get(name):
                    curves.setdefault((name, int(row["step"])), set()).add(row[name])
    return curves


def test_a_run_that_is_killed_and_preempted_equals_one_that_is_not(tmp_path, vlm):
    whole, struck = tmp_path / "whole", tmp_path / "struck"
    whole.mkdir()
    struck.mkdir()
    run = _start(whole, _config(vlm, whole))
    assert run.returncode == 0, run.stderr
    config = _config(vlm, struck, (3, "SIGKILL"), (7, "SIGTERM"))
    killed = _start(struck, config)
    assert killed.returncode == -signal.SIGKILL
    preempted = _start(struck, config)
    assert preempted.returncode == 0, preempted.stderr
    assert "going on from" in preempted.stderr
    assert "stopped by SIGTERM at step 7; saved" in preempted.stderr
    assert not (struck / "model").exists()
    finished = _start(struck, config)
    assert finished.returncode == 0, finished.stderr
    assert _curves(struck) == _curves(whole)
    assert {step for name, step in _curves(whole) if name == "mir"} == {0, 2, 4, 6, 8, 10}
    states = [AutoModelForImageTextToText.from_pretrained(f / "model").state_dict() for f in (whole, struck)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    _check_what_is_left(struck, vlm)


def _check_what_is_left(folder, vlm):
    """The best checkpoint by MIR, in both formats, alike; the last one; no half-written file."""
    (best,) = (folder / "checkpoints").glob("step=*.ckpt")
    checkpoint = torch.load(best, weights_only=True)
    exported = AutoModelForImageTextToText.from_pretrained(best.with_suffix("")).state_dict()
    assert all(torch.equal(exported[k.removeprefix("vlm.")], v) for k, v in checkpoint["state_dict"].items())
    assert AutoProcessor.from_pretrained(best.with_suffix("")).image_token_id
    assert not list(folder.glob("**/.*.part"))
    assert (folder / "checkpoints" / "finished").exists()
    mirs = [float(v) for (name, step), values in _curves(folder).items() if name == "mir" and step for v in values]
    assert float(best.stem.rsplit("=", 1)[1]) == pytest.approx(min(mirs), abs=1e-3)
