"""MM1's ablations at the scale of two CPU cores: connector, visual tokens, resolution, mixture.

    python -m tests.benchmarks.mm1 runs/mm1 [--steps 200] [--seeds 0 1 2] [--share 1/2] [--only NAME ...]
        [--precision bf16-mixed]

trains small LLaVAs from random weights, all parts at once, on drawn shapes, with the options of the recipe, and
reads the finished models on one held-out probe: loss, image gain, MIR, SDS by ability. What is done already is not
done again; ``--share 1/2`` beside ``--share 2/2`` runs on two cores. Prints the tables of docs/mm1.md.
"""

import argparse
import json
import re
import statistics
import zlib
from pathlib import Path

import torch
import transformers
import yaml
from tokenizers.processors import TemplateProcessing

from mir_lightning import Probe, evaluate_image_gain, evaluate_mir
from mir_lightning.llava.data.batches import ConversationCollator
from mir_lightning.llava.data.prompts import PlainPrompt
from mir_lightning.llava.demo.shapes import COLOURS, NUMBERS, RELATIONS, SHAPES, SIZES, ShapesDataset
from mir_lightning.llava.model import saving
from mir_lightning.probing.choices.evaluate import evaluate_choices
from mir_lightning.probing.choices.items import IMAGE, ChoiceItem
from mir_lightning.probing.choices.probe import ChoiceProbe
from recipes.llava_pretrain import main as recipe
from tests.processors import tokenizer

BASE = {"connector": "c_abstractor", "visual_tokens": 9, "image_size": 48, "weights": (0.45, 0.45, 0.1)}
ABLATIONS = {
    "connector": [
        {"connector": "c_abstractor"},
        {"connector": "avg_pool"},
        {"connector": "attention_pool"},
        {"connector": "resampler"},
        {"connector": "pixel_shuffle"},
        *({"connector": name, "visual_tokens": None} for name in ("mlp", "linear", "mlp_norm")),
    ],
    "visual tokens": [{"visual_tokens": n} for n in (1, 9, 36)],
    "resolution": [{"image_size": n} for n in (24, 48, 72)],
    "mixture": [
        {"weights": (0.45, 0.45, 0.1)},
        {"weights": (1.0, 0, 0)},
        {"weights": (0.9, 0, 0.1)},
    ],
}
KINDS = ("captions", "interleaved", "text")
READINGS = ("loss", "gain", "mir", "perception", "reasoning")


def save_parts(root):
    """Random weights of a small LLM and a small CLIP, with tokenizer and image processor."""
    torch.manual_seed(0)
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    clip = transformers.CLIPVisionConfig(**vision, image_size=48, patch_size=8)
    llama = transformers.LlamaConfig(**text, vocab_size=400, pad_token_id=0)
    pixels = transformers.CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False)
    for part in (transformers.CLIPVisionModel(clip), pixels):
        part.save_pretrained(root / "vision")
    words = tokenizer("<image>")
    start = (words.bos_token, words.bos_token_id)  # before the picture, which would be the attention sink
    words.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    for part in (transformers.LlamaForCausalLM(llama), words):
        part.save_pretrained(root / "llm")


def config(options, folder, seed, connector, visual_tokens, image_size, weights):
    """Of a run of the recipe."""
    root, steps = options.root, options.steps
    parts = [{"module": part, "lr": 1e-3} for part in ("vision", "projector", "llm")]
    sources = [
        {"name": kind, "weight": weight, "source": {"class_path": "Shapes", "init_args": {"kind": kind}}}
        for kind, weight in zip(KINDS, weights, strict=True)
        if weight
    ]
    return {
        "seed_everything": seed,
        "trainer": {
            **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "gradient_clip_val": 1.0, "logger": False},
            **{"default_root_dir": str(folder), "enable_progress_bar": False, "enable_model_summary": False},
            "precision": options.precision,
        },
        "model": {
            **{"llm": str(root / "llm"), "vision": str(root / "vision"), "feature_layer": -1},
            **{"connector": connector, "visual_tokens": visual_tokens, "image_size": image_size},
            **{"stages": [{"train": parts}], "warmup_ratio": 0.05},
        },
        "data": {
            **{"batch_size": 16, "data_scale": 16 * steps, "probe_size": 20, "gain_samples": 0, "seed": seed},
            **{"caption_pictures": 0, "source": {"class_path": "Mixture", "init_args": {"sources": sources}}},
        },
        "mir": {"every_n_steps": None, "at_start": False, "at_end": False},
        "checkpoint": {"save_top_k": 0},
        "restart": {"every_n_train_steps": steps},
    }


def probe(processor, count=128, size=16):
    """Held-out pictures with their captions."""
    collate, samples = (
        ConversationCollator(processor, PlainPrompt(), always_pictures=False),
        ShapesDataset("held_out", count),
    )
    batches = [collate([samples[i] for i in range(start, start + size)]) for start in range(0, count, size)]
    for batch in batches:
        batch.pop("unreadable")
    return Probe(batches)


def items(per_task=40):
    """Held-out pictures; each caption against those that differ from it in a word, the relation for reasoning."""
    words = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "count": NUMBERS, "relation": RELATIONS}
    found, samples = {task: [] for task in words}, ShapesDataset("held_out", 10_000, seed=1)
    for index in range(len(samples)):
        if all(len(of_task) == per_task for of_task in found.values()):
            break
        (picture,), (_, caption) = samples[index].images, samples[index].turns
        for task, choices in words.items():
            word = re.search(rf"\b({'|'.join(choices)})(?=s\b|es\b|\b)", caption, re.IGNORECASE)
            if word is None or len(found[task]) == per_task or (task == "count" and caption.startswith("A ")):
                continue
            others = [choice for choice in choices if choice != word[0].lower()]
            wrong = [caption[: word.start()] + other + caption[word.end() :] for other in others]
            wrong = tuple((text[0].upper() + text[1:]).replace("crosss", "crosses") for text in wrong)
            ability = "reasoning" if task == "relation" else "perception"
            found[task].append(ChoiceItem(f"{task} {index}", IMAGE, caption, wrong, task, ability, (picture,)))
    return [item for of_task in found.values() for item in of_task]


def readings(folder):
    """What a finished model tells on the probe and the items, with standard errors."""
    model, processor = saving.load_vlm(str(folder)).eval(), saving.load_processor(str(folder))
    mir = evaluate_mir(model, held_out := probe(processor), interval=True)
    gain = evaluate_image_gain(model, held_out)
    choices = evaluate_choices(model, ChoiceProbe(items(), processor, "{prompt}"), "logprob", batch_size=64)
    sds = {ability: choices.breakdown[ability].sds for ability in ("perception", "reasoning")}
    return {
        "loss": gain.loss,
        "gain": gain.gain,
        "mir": mir.mir,
        **sds,
        "gain_se": gain.standard_error,
        "mir_se": mir.standard_error,
    }


def run(options, setting, seed):
    """Train and read, unless that is done already."""
    values = [*setting.values(), options.precision, options.steps, seed]
    folder = options.root / "_".join(str(value) for value in values).replace(" ", "")
    if (done := Path(f"{folder}.json")).exists():
        return json.loads(done.read_text())
    (file := Path(f"{folder}.yaml")).write_text(yaml.safe_dump(config(options, folder, seed, **setting)))
    recipe(["fit", "--config", str(file)])
    found = readings(folder / "model")
    done.write_text(json.dumps(found))
    return found


def interval(values):
    """Mean over seeds, and half of its 95 % interval by Student's t."""
    half = 4.303 * statistics.stdev(values) / len(values) ** 0.5 if len(values) == 3 else float("nan")
    return f"{statistics.fmean(values):.3f} ± {half:.3f}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", default="1/1")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--only", nargs="+", default=list(ABLATIONS))
    options = parser.parse_args()
    options.root.mkdir(parents=True, exist_ok=True)
    if not (options.root / "llm").exists():
        save_parts(options.root)
    part, parts = map(int, options.share.split("/"))
    for name in options.only:
        print(f"\n| {name} | " + " | ".join(READINGS) + " |\n|" + "---|" * (1 + len(READINGS)))
        for change in ABLATIONS[name]:
            setting = {**BASE, **change}
            mine = [s for s in options.seeds if zlib.crc32(f"{setting}{s}".encode()) % parts == part - 1]
            found = [run(options, setting, seed) for seed in mine]
            if len(found) == len(options.seeds):
                label = ", ".join(str(value) for value in change.values())
                print(
                    f"| {label} | " + " | ".join(interval([row[key] for row in found]) for key in READINGS) + " |"
                )


if __name__ == "__main__":
    main()
