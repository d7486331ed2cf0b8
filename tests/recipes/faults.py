"""Faults planted in runs of the recipe, to see which readings tell of them.

    python -m tests.recipes.faults runs/faults [--seeds 0] [--clean 0 1 2 3 4] [--precision 32-true]

trains a small LLaVA from random weights on drawn shapes, clean with some seeds and with each fault, and
prints alarms and readings.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
import yaml

from recipes.controls import Fault
from tests.processors import tokenizer

ROOT = Path(__file__).parents[2]


def save_small_vlm(folder: Path) -> None:
    """A LLaVA of 1.4 million random weights, whose pictures are 36 patches and CLS."""
    torch.manual_seed(0)
    tokens = tokenizer("<image>")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **{"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4},
            **{"image_size": 48, "patch_size": 8},
        ),
        text_config=transformers.LlamaConfig(
            **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4},
            **{"vocab_size": 400, "pad_token_id": 0},
        ),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    pixels = transformers.CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False)
    options = {"patch_size": 8, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 1}
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.LlavaProcessor(pixels, tokens, **options).save_pretrained(folder)


def small_run(root: Path, name: str, seed: int, fault: Fault | None, steps: int = 200) -> dict[str, Any]:
    """The config of a run below ``root``, of the model there."""
    parts = [{"module": part, "lr": 1e-3} for part in ("vision", "projector", "llm")]
    planted = [{"class_path": "recipes.controls.Planted", "init_args": {"fault": fault}}] if fault else []
    return {
        "seed_everything": seed,
        "trainer": {
            **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "log_every_n_steps": 10},
            **{"gradient_clip_val": 1.0, "default_root_dir": str(root / name), "enable_progress_bar": False},
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(root / name), "name": "csv"},
            },
            "callbacks": planted,
        },
        "model": {"vlm": str(root / "vlm"), "stages": [{"train": parts}], "warmup_ratio": 0.05},
        "data": {
            **{"batch_size": 16, "data_scale": 16 * steps, "probe_size": 64, "gain_samples": 64, "seed": seed},
            "caption_pictures": 0,
        },
        "mir": {"every_n_steps": steps // 10},
        "restart": {"every_n_train_steps": steps},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="of the runs with faults")
    parser.add_argument("--clean", type=int, nargs="*", default=range(5), help="seeds of the clean runs")
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args()
    root: Path = options.root
    save_small_vlm(root / "vlm")
    runs: list[tuple[str, int, Fault | None]] = [(f"clean, seed {seed}", seed, None) for seed in options.clean]
    runs += [(f"{fault}, seed {seed}", seed, fault) for fault in get_args(Fault) for seed in options.seeds]
    for name, seed, fault in runs:
        config = small_run(root, name, seed, fault)
        config["trainer"]["precision"] = options.precision
        (file := root / f"{name}.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, str(ROOT / "recipes" / "llava_pretrain.py"), "fit", "--config", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        print(name, *(line for line in done.stderr.splitlines() if ": step " in line), done.stdout, sep="\n")


if __name__ == "__main__":
    main()
