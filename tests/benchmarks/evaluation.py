"""Time of ``evaluate_mir`` against the bare forward pass of the same probe, in one process.

    python -m tests.benchmarks.evaluation [--pairs 3] [--samples 60] [--length 256]

SmolLM2-135M and EfficientNet-Lite0 with packaged weights. Runs are paired; the minimum of each is compared. The
lean forward computes what the evaluation's forward computes, last logits only and no cache; the plain one is
``model(**batch)``, with all logits.
"""

import argparse
import resource
import time

import torch

from mir_lightning import Probe, evaluate_image_gain, evaluate_mir
from mir_lightning.llava.demo.shapes import draw_sample
from mir_lightning.llava.demo.weights import build_packaged_llava, build_packaged_processor


def build_probe(samples, length, batch_size=4, pictures=3):
    """``pictures`` of 49 vision tokens a sample, then text up to ``length`` tokens."""
    processor = build_packaged_processor()
    words = processor.tokenizer(" ".join(draw_sample("train", i)[1] for i in range(40)))["input_ids"]
    batches = []
    for start in range(0, samples, batch_size):
        indices = range(start, min(start + batch_size, samples))
        images = [draw_sample("held_out", i * pictures + j)[0] for i in indices for j in range(pictures)]
        image_ids = [processor.image_token_id] * 49 * pictures
        rows = []
        for i in indices:
            shifted = words[i % 50 :] + words[: i % 50]
            rows.append([1, *image_ids, *shifted][:length])
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        batches.append({"input_ids": torch.tensor(rows), "pixel_values": pixels})
    return Probe(batches)


def build_model():
    """The packaged LLaVA with a random projector: its own starts silent, and silence has no covariance."""
    torch.manual_seed(0)
    model = build_packaged_llava().eval()
    for part in model.model.multi_modal_projector.modules():
        if isinstance(part, torch.nn.Linear):
            part.reset_parameters()
    return model


def _labels(ids):
    """The last 20 tokens, as those of a caption."""
    labels = torch.full_like(ids, -100)
    labels[:, -20:] = ids[:, -20:]
    return labels


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    model = build_model()
    probe = build_probe(options.samples, options.length)
    labelled = Probe([{**batch, "labels": _labels(batch["input_ids"])} for batch in probe])
    peaks, result = {}, None

    def forward(**lean):
        with torch.no_grad():
            for batch in probe:
                model(**batch, **lean)

    ways = {
        "lean forward": lambda: forward(use_cache=False, logits_to_keep=1),
        "evaluate_mir": lambda: evaluate_mir(model, probe),
        "plain forward": forward,
        "products=float32": lambda: evaluate_mir(model, probe, products="float32"),
        "rank_order=1": lambda: evaluate_mir(model, probe, rank_order=1),
        "interval=True": lambda: evaluate_mir(model, probe, interval=True),
        "image gain": lambda: evaluate_image_gain(model, labelled),
    }
    times = {name: [] for name in ways}
    for _ in range(options.pairs):
        for name, way in ways.items():
            start = time.perf_counter()
            found = way()
            result = found if name == "evaluate_mir" else result
            times[name].append(time.perf_counter() - start)
            peaks.setdefault(name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(f"{result.vision_tokens} vision and {result.text_tokens} text tokens, {options.pairs} pairs")
    lean = min(times["lean forward"])
    for name, seconds in times.items():
        print(f"{name:<16}{min(seconds):>8.2f} s   {min(seconds) / lean:.3f} lean forwards")
    extra = peaks["evaluate_mir"] - peaks["lean forward"]
    print(f"peak memory of evaluate_mir beyond the lean forward's: {extra:.0f} MiB")


if __name__ == "__main__":
    main()
