"""Small runs of the recipe as a user starts them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
_BY_SOURCE = ("train_sources/", "train_share/", "mir_sources/", "image_gain_sources/")


MIXTURE = {
    "class_path": "Mixture",
    "init_args": {
        "sources": [
            {"name": kind, "source": {"class_path": "Shapes", "init_args": {"kind": kind}}}
            for kind in ("captions", "interleaved", "text")
        ]
    },
}
"""Captions, documents and texts of drawn shapes, as MM1 mixes them."""


def small_config(vlm, folder, *strikes, data=None):
    """Two stages, two epochs of five steps; ``strikes`` are (step, signal) or (step, signal, within)."""
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
                    "init_args": dict(zip(("step", "signal_name", "within"), strike, strict=False)),
                }
                for strike in strikes
            ],
        },
        "model": {
            "vlm": str(vlm),
            "stages": [{"train": parts[:1], "steps": 3}, {"train": parts}],
        },
        "data": {
            "batch_size": 2,
            "global_batch_size": 4,
            "data_scale": 20,
            "probe_size": 4,
            "num_workers": 1,
            **(data or {}),
        },
        "mir": {"every_n_steps": 2},
        "restart": {"every_n_train_steps": 2},
    }


def start(tmp_path, config):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "llava_pretrain.py"), "fit", "--config", str(file)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def curves_of(folder):
    """Loss and MIR by step, over all and by source; where a step was run again, all its values."""
    curves = {}
    for file in sorted(folder.glob("csv/version_*/metrics.csv")):
        for row in csv.DictReader(file.open()):
            for name in row:
                if row[name] and (name in ("train/loss", "mir", "mir_probe/loss") or name.startswith(_BY_SOURCE)):
                    curves.setdefault((name, int(row["step"])), set()).add(row[name])
    return curves
