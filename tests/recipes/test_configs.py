"""Every shipped config: it parses to what it says, and takes two steps with tiny weights of the same classes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
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

from mir_lightning import evaluate_mir
from mir_lightning.llava.data.module import PretrainingData
from mir_lightning.llava.model.backbones import ModelSource, build_processor
from mir_lightning.llava.model.saving import load_processor, load_vlm
from mir_lightning.probing.images import UnreadableImageError
from mir_lightning.probing.pairs import PairProbe, read_pairs
from mir_lightning.report import read_run
from tests.families import TEXT, VISION
from tests.recipes.runs import MIXTURE

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
        "model": {"llm": str(weights / "llm"), "vision": str(weights / model)},
        "data": {"batch_size": 2, "global_batch_size": 2, "data_scale": 8, "probe_size": 4, "num_workers": 0},
        "mir": {"every_n_steps": 1},
    }
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    files = [*configs, tmp_path / "small.yaml", *after]
    recipe.main(["fit", *(part for file in files for part in ("--config", str(file)))])


@pytest.mark.parametrize(
    "schedule",
    [pytest.param(s, marks=pytest.mark.slow if s not in ("lora", "unfrozen_llm") else ()) for s in SCHEDULES],
)
def test_two_steps_of_every_schedule(recipe, tmp_path, weights, capsys, schedule):
    configs = [CONFIGS / "models" / "llava15_7b.yaml", CONFIGS / "schedules" / f"{schedule}.yaml"]
    _two_steps(recipe, tmp_path, weights, *configs)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:5]] == ["0", "1", "2"]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "model" / "adapter").is_dir() == (schedule == "lora")


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True])
def test_two_steps_of_mm1_at_its_published_shapes(recipe, tmp_path, weights, experts):
    """378 pixels, 144 tokens of a C-Abstractor, packed rows of 4,096, everything unfrozen; 64 experts."""
    vision = {**VISION, "num_hidden_layers": 2, "patch_size": 14, "image_size": 28}
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(weights / "mm1")
    small = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=small).save_pretrained(weights / "mm1")
    configs = [CONFIGS / "mm1" / f"{name}.yaml" for name in ("published", "published_moe")[: 1 + experts]]
    more = {"trainer": {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger"}, "log_every_n_steps": 1}}
    more["trainer"]["logger"]["init_args"] = {"save_dir": str(tmp_path)}
    more["data"] = {
        "source": MIXTURE,
        "data_scale": 20,
        "batch_size": 10,
        "global_batch_size": 10,
        "probe_size": 10,
    }
    more["mir"] = {"every_n_steps": 2}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
    _two_steps(recipe, tmp_path, weights, *configs, model="mm1", after=[tmp_path / "more.yaml"])
    model, processor = (load(str(tmp_path / "run" / "model")) for load in (load_vlm, load_processor))
    assert (
        processor(images=Image.new("RGB", (50, 40)), text="<image>")["input_ids"][0].count(
            model.config.image_token_id
        )
        == model.config.image_seq_length
        == 144
    )
    assert model.config.vision_config.image_size == 378
    curves = read_run(tmp_path).curves
    for name in ("captions", "interleaved"):
        assert len(curves[f"mir_sources/{name}"]) == len(curves[f"image_gain_sources/{name}"]) == 2
    shares = [curves[f"train_share/{name}"][-1][1] for name in ("captions", "interleaved", "text")]
    assert shares == pytest.approx([0.45, 0.45, 0.1])
    assert ("moe/load/layer_02" in curves) == ("train/router_z" in curves) == experts


def test_two_steps_of_the_small_pair_with_all_that_can_be_measured(recipe, tmp_path, weights):
    more = {
        "trainer": {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger"}, "log_every_n_steps": 1},
        "data": {"shapes_choices": 1, "shapes_few_shot": 1},
        "sds": {"every_n_steps": 2},
        "throughput": {"window_size": 2},
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
        "image_gain_blank",
        "sds_abilities/perception",
        "sds_abilities/reasoning",
        "few_shot/em_8",
        "few_shot/f1_0",
    ):
        assert [step for step, _ in curves[name]] == (
            [0, 1, 2] if name.startswith(("mir", "image")) else [0, 2]
        ), name
    waited = [share for _, share in curves["train/data_wait"]]
    assert len(waited) == 2
    assert all(0 < share < 1 for share in waited)
    (_, tokens), (_, samples) = (
        curves["train/device/items_per_sec"][-1],
        curves["train/device/samples_per_sec"][-1],
    )
    assert 10 < tokens / samples < 200  # tokens of a sample
    (pictures,) = tmp_path.glob("**/captions_media/captions.png")
    assert pictures.stat().st_size > 5000


def test_fine_tuning_starts_from_a_pre_trained_model_and_is_scored_by_its_answers(recipe, tmp_path, weights):
    """LLaVA-665K's layout: several turns, texts alone, pictures in folders; a model without a chat template."""
    (tmp_path / "images" / "coco").mkdir(parents=True)
    records = []
    for number in range(12):
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A picture."},
            {"from": "human", "value": "How many?"},
            {"from": "gpt", "value": "One."},
        ]
        records.append({"id": str(number), "image": f"coco/{number}.png", "conversations": turns})
        Image.effect_noise((20, 20), 50).save(tmp_path / "images" / "coco" / f"{number}.png")
        if number % 3 == 0:
            del records[-1]["image"]
            turns[0]["value"] = "What is it?"
    (tmp_path / "mix.json").write_text(json.dumps(records))
    _two_steps(recipe, tmp_path / "first", weights, CONFIGS / "models" / "llava15_7b.yaml")
    model = tmp_path / "first" / "run" / "model"
    source = {"files": [str(tmp_path / "mix.json")], "image_folder": str(tmp_path / "images")}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    more = {
        "trainer": {"logger": logger, "log_every_n_steps": 1},
        "model": {"vlm": str(model), "llm": None, "vision": None},
        "data": {
            "source": {"class_path": "Records", "init_args": source},
            "chat_template": str(CONFIGS / "templates" / "vicuna.jinja"),
            "data_scale": 8,
            "answers": 2,
            "max_length": 512,
        },
        "answers": {"max_new_tokens": 2},
    }
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
    before = load_vlm(str(model)).state_dict()
    _two_steps(recipe, tmp_path, weights, CONFIGS / "finetune.yaml", after=[tmp_path / "more.yaml"])
    after = load_vlm(str(tmp_path / "run" / "model")).state_dict()
    moved = {name.split(".")[1] for name in after if not torch.equal(before[name], after[name])}
    assert moved - {"weight"} == {"language_model", "multi_modal_projector"}  # and that of the output head
    template = load_processor(str(tmp_path / "run" / "model")).chat_template
    assert template == (CONFIGS / "templates" / "vicuna.jinja").read_text()
    curves = read_run(tmp_path).curves
    scores = [value for _, value in curves["answers/em_0"]]
    tasks = [name for name in curves if name.startswith("answers_tasks/em_0/")]
    assert len(tasks) == 7
    assert scores[-1] == pytest.approx(sum(curves[name][-1][1] for name in tasks) / 7)
    assert {name for name in curves if name.startswith("answers_abilities/em_0/")} == {
        "answers_abilities/em_0/perception",
        "answers_abilities/em_0/reasoning",
    }


@pytest.mark.parametrize("change", [{"prompt": "plain"}, {"chat_template": "nowhere.jinja"}])
def test_a_chat_template_is_a_file_for_chats(change):
    options = {"prompt": "chat", "chat_template": CONFIGS / "templates" / "short.jinja", **change}
    with pytest.raises(ValueError, match="chat_template: a file that goes with"):
        PretrainingData(**{**options, "chat_template": Path(options["chat_template"])})


def test_unreadable_pictures_are_named_replaced_and_at_last_too_many(recipe, tmp_path, weights, recwarn):
    (tmp_path / "images").mkdir()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A picture."}]
    records = [{"id": str(i), "image": f"{i}.png", "conversations": turns} for i in range(12)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    for number in range(0, 12, 2):
        Image.effect_noise((20, 20), 50).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number + 1}.png").write_bytes(b"cut off")
    source = {"files": [str(tmp_path / "data.json")], "image_folder": str(tmp_path / "images")}
    data = {"source": {"class_path": "Records", "init_args": source}, "max_unreadable": 0.9}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    config = CONFIGS / "models" / "llava15_7b.yaml"
    _two_steps(recipe, tmp_path, weights, config, after=[tmp_path / "data.yaml"])
    said = [str(warning.message) for warning in recwarn]
    for where in ("left out: ", "replaced in the probe: "):
        assert any(line.startswith(f"{where}{tmp_path / 'images'}") and "cannot identify" in line for line in said)
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": {**data, "max_unreadable": 0.01}}))
    with pytest.raises(UnreadableImageError, match=r"samples cannot be used: more than max_unreadable=0\.01"):
        _two_steps(recipe, tmp_path / "again", weights, config, after=[tmp_path / "data.yaml"])


def test_a_probe_of_other_pictures_and_texts(recipe, tmp_path, weights):
    for name in ("images", "texts"):
        (tmp_path / name).mkdir()
    for number in range(4):
        Image.effect_noise((20, 20), 50).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "texts" / f"{number}.txt").write_text(f"One story and {number} more of them.")
    probe = {"images": str(tmp_path / "images"), "texts": str(tmp_path / "texts")}
    (tmp_path / "probe.yaml").write_text(yaml.safe_dump({"mir": {"probe": probe, "on_error": "raise"}}))
    _two_steps(recipe, tmp_path, weights, CONFIGS / "models" / "llava15_7b.yaml", after=[tmp_path / "probe.yaml"])
    (best,) = (tmp_path / "run" / "checkpoints").glob("step=*.ckpt")
    state = torch.load(best, weights_only=True)
    (mir,) = [value for key, value in state["callbacks"].items() if key.startswith("RecipeMIR")]
    processor = build_processor(ModelSource(vlm=str(best.with_suffix(""))))
    pairs = read_pairs(tmp_path / "images", tmp_path / "texts", 4)
    vlm = load_vlm(str(best.with_suffix("")))
    expected = evaluate_mir(vlm, PairProbe(processor, vlm.config, pairs, 2)).mir
    assert mir["history"][-1]["mir"] == pytest.approx(expected, rel=1e-5)
    (tmp_path / "probe.yaml").write_text(yaml.safe_dump({"mir": {"probe": {"images": probe["images"]}}}))
    with pytest.raises(ValueError, match="images and texts go together"):
        _two_steps(
            recipe, tmp_path, weights, CONFIGS / "models" / "llava15_7b.yaml", after=[tmp_path / "probe.yaml"]
        )


OF_RUNS = sorted(file for file in CONFIGS.glob("**/*.yaml") if "factors" not in yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    "file", OF_RUNS, ids=lambda path: "-".join(path.relative_to(CONFIGS).with_suffix("").parts)
)
def test_print_config_is_what_the_file_says(recipe, capsys, file):
    with pytest.raises(SystemExit) as stop:
        recipe.main(["fit", "--config", str(file), "--print_config"])
    assert stop.value.code == 0
    printed, written = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(file.read_text())
    _is_part_of(written, printed)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Records", {"files": ["a.json"], "image_folder": "images"}),
        ("Table", {"folder": "table", "image_column": "picture"}),
        ("Shards", {"folder": "s3://bucket/shards"}),
        ("Shapes", {"kind": "interleaved"}),
        ("Documents", {"files": ["a.jsonl"], "max_images": 4}),
        ("tests.recipes.interruptions.NoData", {}),
    ],
)
def test_a_source_is_chosen_by_name_on_the_command_line(recipe, capsys, name, options):
    words = [f"--data.source={name}", *(f"--data.source.{key}={value}" for key, value in options.items())]
    with pytest.raises(SystemExit) as stop:
        recipe.main(["fit", *words, "--print_config"])
    assert stop.value.code == 0
    chosen = yaml.safe_load(capsys.readouterr().out)["data"]["source"]
    assert chosen["class_path"].rpartition(".")[2] == name.rpartition(".")[2]
    _is_part_of(options, chosen.get("init_args", {}))


def _is_part_of(part, whole):
    if isinstance(part, dict):
        for key, value in part.items():
            short = key == "class_path" and "." not in value  # printed with its module
            _is_part_of(value, whole[key].rpartition(".")[2] if short else whole[key])
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
