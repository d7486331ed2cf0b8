"""Time of ``evaluate_choices`` against one full forward a candidate, in one process.

    python -m tests.benchmarks.choices [--items 32] [--pictures 3] [--pairs 3]

SmolLM2-135M and EfficientNet-Lite0 with packaged weights, 49 vision tokens a picture, 4 candidates an item. The
full forwards get their inputs ready made; ``evaluate_choices`` opens, processes and tokenises within its time.
Runs are in turn; the minimum of each is compared.
"""

import argparse
import time

import torch

from mir_lightning.llava.backbones import build_packaged_processor
from mir_lightning.llava.shapes import draw_sample
from mir_lightning.probing import ChoiceItem, ChoiceProbe, evaluate_choices
from mir_lightning.probing.candidate_scores import CandidateScorer
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
    scorer = CandidateScorer(model, probe, "logit", None, False)
    singles = [_candidate_inputs(probe, item) for item in probe.items]

    @torch.no_grad()
    def one_at_a_time(lean):
        """What the released script runs: image, question and one candidate, for each candidate."""
        keep = {"use_cache": False, "logits_to_keep": 32} if lean else {}
        for candidates in singles:
            for inputs in candidates:
                model(**inputs, **keep)

    ways = {
        "full forward a candidate": lambda: one_at_a_time(False),
        "the same, last 32 logits and no cache": lambda: one_at_a_time(True),
        "full forwards in batches": lambda: _batched(scorer, probe.items),
        "evaluate_choices": lambda: evaluate_choices(model, probe),
    }
    times = {name: [] for name in ways}
    for _ in range(options.pairs):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    result = evaluate_choices(model, probe)
    with torch.no_grad():
        whole = torch.cat(_batched(scorer, probe.items))
    difference = (torch.cat(result.scores) - whole).abs().max().item()
    prompt = singles[0][0]["input_ids"].shape[1]
    print(f"{options.items} items of 4 candidates, {49 * options.pictures} of {prompt} tokens are vision")
    ours = min(times["evaluate_choices"])
    for name, seconds in times.items():
        print(f"{name:<40}{min(seconds):>8.2f} s{min(seconds) / ours:>8.2f} times evaluate_choices")
    print(f"prefix shared: {result.shared_prefix}; largest difference of a score: {difference:.1e}")


def _candidate_inputs(probe, item):
    encoded = probe.encode([item])
    pixels = {key: value for key, value in encoded.inputs.items() if key not in ("input_ids", "attention_mask")}
    return [{"input_ids": torch.tensor([c.ids]), **pixels} for c in encoded.candidates[0]]


@torch.no_grad()
def _batched(scorer, items, size=8):
    return [scores for start in range(0, len(items), size) for scores in scorer.whole(items[start : start + size])]


if __name__ == "__main__":
    main()
