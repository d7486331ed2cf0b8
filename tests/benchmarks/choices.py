"""Time of ``evaluate_choices`` against one full forward a candidate, in one process.

    python -m tests.benchmarks.choices [--items 32] [--pictures 3] [--pairs 3]

SmolLM2-135M and EfficientNet-Lite0 with packaged weights, 49 vision tokens a picture, 4 candidates an item. The
full forwards get their inputs ready made; ``evaluate_choices`` opens, processes and tokenises within its time.
Runs are in turn; the minimum of each is compared.
"""

import argparse
import time

import torch

from mir_lightning.llava.demo.shapes import draw_sample
from mir_lightning.llava.demo.weights import build_packaged_processor
from mir_lightning.probing import ChoiceItem, ChoiceProbe, evaluate_choices
from tests.benchmarks.evaluation import build_model


def build_items(count, pictures):
    """Four phrases an item, of which one is what its first picture shows."""
    items = []
    for i in range(count):
        images = tuple(draw_sample("held_out", i * pictures + j)[0] for j in range(pictures))
        phrase = " ".join(draw_sample("held_out", i * pictures)[1].split()[1:4]).rstrip(".")
        wrong = tuple(
            f"{size} {colour} shape" for size, colour in (("small", "pink"), ("large", "grey"), ("tiny", "red"))
        )
        items.append(
            ChoiceItem(f"{i}", "What does the first picture show?", phrase, wrong, "caption", "all", images)
        )
    return items


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    model = build_model()
    probe = ChoiceProbe(build_items(options.items, options.pictures), build_packaged_processor())
    singles = [_single_forwards(probe, item) for item in probe.items]

    @torch.no_grad()
    def one_at_a_time(**lean):
        """What the released script runs: image, question and one candidate, for each candidate."""
        scores = []
        for ids, starts, pixels in singles:
            for row, start in zip(ids, starts, strict=True):
                logits = model(input_ids=row, **pixels, **lean).logits[0]
                answer = row[0, start:]
                scores.append(logits[-1 - len(answer) : -1].gather(1, answer[:, None]).mean())
        return torch.stack(scores)

    ways = {
        "one full forward a candidate": one_at_a_time,
        "the same, last 32 logits and no cache": lambda: one_at_a_time(use_cache=False, logits_to_keep=32),
        "evaluate_choices": lambda: torch.cat(evaluate_choices(model, probe).scores),
    }
    times, scores = {name: [] for name in ways}, {}
    for _ in range(options.pairs):
        for name, way in ways.items():
            start = time.perf_counter()
            scores[name] = way()
            times[name].append(time.perf_counter() - start)
    tokens = singles[0][0][0].shape[1]
    print(f"{options.items} items of 4 candidates, {49 * options.pictures} of {tokens} tokens are vision")
    ours = min(times["evaluate_choices"])
    for name, seconds in times.items():
        print(f"{name:<40}{min(seconds):>8.2f} s{min(seconds) / ours:>8.2f} times evaluate_choices")
    difference = (scores["evaluate_choices"] - scores["one full forward a candidate"]).abs().max()
    print(f"largest difference of a score: {difference:.1e}")


def _single_forwards(probe, item):
    """Token ids ``[1, S]`` of each candidate with its prompt, where each starts, and the pictures."""
    encoded = probe.encode([item])
    pixels = {key: value for key, value in encoded.inputs.items() if key not in ("input_ids", "attention_mask")}
    candidates = encoded.candidates[0]
    return [torch.tensor([c.ids]) for c in candidates], [c.start for c in candidates], pixels


if __name__ == "__main__":
    main()
