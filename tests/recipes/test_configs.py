"""Every shipped config: it parses to what it says, and takes two steps with tiny weights of the same classes."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mir_lightning.report import read_run
from tests.families import TEXT, VISION

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
SCHEDULES = sorted(path.stem for path in (CONFIGS / "schedules").glob("*.yaml"))
CROP = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("llava_pretrain", CONFIGS.parent / "llava_pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tiny_processor):
    """Tiny random models with the layers that the schedules name: 24 of the encoder's, 17 of the LLM's."""
    root = tmp_path_factory.mktemp("weights")
    tokenizer = tiny_processor.tokenizer
    text = {**TEXT, "num_hidden_layers": 17, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**text)).save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    vision = {**VISION, "num_hidden_layers": 24}
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(root / "llava15_7b")
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=CROP).save_pretrained(root / "llava15_7b")
    SiglipVisionModel(SiglipVisionConfig(**vision)).save_pretrained(root / "smollm2_siglip")
    SiglipImageProcessorPil(size=CROP).save_pretrained(root / "smollm2_siglip")
    return root


def _two_steps(recipe, tmp_path, weights, *configs, model="llava15_7b", after=()):
    small = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "precision": "32-true",
            "max_steps": 2,
            "logger": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path / "run"),
        },
        "model": {"source": {"llm": str(weights / "llm"), "vision": str(weights / model)}},
        "data": {"batch_size": 2, "global_batch_size": 2, "data_scale": 8, "probe_size": 4, "num_workers": 0},
        "mir": {"every_n_steps": 1},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    files = [*configs, tmp_path / "small.yaml", *after]
    recipe.main(["fit", *(part for file in files for part in ("--config", str(file)))])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_steps_of_every_schedule(recipe, tmp_path, weights, capsys, schedule):
    configs = [CONFIGS / "models" / "llava15_7b.yaml", CONFIGS / "schedules" / f"{schedule}.yaml"]
    _two_steps(recipe, tmp_path, weights, *configs)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:5]] == ["0", "1", "2"]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "model" / "adapter").is_dir() == (schedule == "lora")


def test_two_steps_of_the_small_pair_with_all_that_can_be_measured(recipe, tmp_path, weights):
    more = {
        "trainer": {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger"}},
        "data": {"shapes_choices": 1, "shapes_few_shot": 1},
        "sds": {"every_n_steps": 2},
        "few_shot": {"every_n_steps": 2, "max_new_tokens": 2},
    }
    more["trainer"]["logger"]["init_args"] = {"save_dir": str(tmp_path)}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
    files = [CONFIGS / "models" / "smollm2_siglip.yaml"]
    _two_steps(recipe, tmp_path, weights, *files, model="smollm2_siglip", after=[tmp_path / "more.yaml"])
    assert (tmp_path / "run" / "checkpoints" / "finished").exists()
    curves = read_run(tmp_path).curves
    for name in (
        "mir",
        "mir_probe/perplexity",
        "sds/perception",
        "sds/reasoning",
        "few_shot/em_8",
        "few_shot/f1_0",
    ):
        assert [step for step, _ in curves[name]] == ([0, 1, 2] if name.startswith("mir") else [0, 2]), name


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: path.stem)
def test_print_config_is_what_the_file_says(recipe, capsys, file):
    with pytest.raises(SystemExit) as stop:
        recipe.main(["fit", "--config", str(file), "--print_config"])
    assert stop.value.code == 0
    printed, written = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(file.read_text())
    _is_part_of(written, printed)


def _is_part_of(part, whole):
    if isinstance(part, dict):
        for key, value in part.items():
            _is_part_of(value, whole[key])
    elif isinstance(part, list):
        for a, b in zip(part, whole, strict=True):
            _is_part_of(a, b)
    else:
        assert part == whole


def test_the_lora_export_loads_as_a_whole_model_and_as_an_adapter(recipe, tmp_path, weights):
    from transformers import AutoModelForImageTextToText

    configs = [CONFIGS / "models" / "llava15_7b.yaml", CONFIGS / "schedules" / "lora.yaml"]
    _two_steps(recipe, tmp_path, weights, *configs)
    folder = tmp_path / "run" / "model"
    merged = AutoModelForImageTextToText.from_pretrained(folder).eval()
    (best,) = (tmp_path / "run" / "checkpoints").glob("step=*.ckpt")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    state = torch.load(tmp_path / "run" / "checkpoints" / best.name, weights_only=True)["state_dict"]
    layer = "model.language_model.layers.0.self_attn.q_proj"
    a, b = (state[f"vlm.{layer}.lora_{x}.default.weight"] for x in "AB")
    base = state[f"vlm.{layer}.base_layer.weight"]
    exported = AutoModelForImageTextToText.from_pretrained(best.with_suffix("")).state_dict()[f"{layer}.weight"]
    torch.testing.assert_close(exported, base + 256 / 128 * b @ a)
