"""Time and memory of a model with MoCa against the same model without, in one process.

    python -m tests.benchmarks.moca [--pairs 5] [--samples 8] [--length 256] [--dtype float32] [--device cpu]

SmolLM2-135M and EfficientNet-Lite0 with packaged weights; MoCa is put in and taken out between runs, with it and
without it first by turns. Minima of the seconds, and the median of the pairs' ratios. "Saved for backward" is what
autograd keeps, counted by storage.
"""

import argparse
import statistics

import torch

from mir_lightning.moca import inject_moca, moca_parameters, remove_moca
from tests.benchmarks.evaluation import build_model, build_probe
from tests.benchmarks.timing import best


def saved_bytes(forward):
    """Bytes of the storages that autograd saves in ``forward``."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(storages.values())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    model = build_model().to(options.device, dtype)
    model.model.vision_tower.requires_grad_(False)
    (batch,) = build_probe(options.samples, options.length, batch_size=options.samples)
    batch = {k: v.to(options.device, dtype if v.is_floating_point() else None) for k, v in batch.items()}
    step = {"input_ids": batch["input_ids"][:, -1:]}

    def loss():
        return model(**batch, labels=batch["input_ids"], use_cache=False).loss

    def train():
        loss().backward()
        model.zero_grad()

    def forward():
        with torch.no_grad():
            model(**batch, use_cache=False)

    def decode():
        """Twenty cached steps of one token."""
        with torch.no_grad():
            cache = model(**batch, logits_to_keep=1).past_key_values
            return best(lambda: [model(**step, past_key_values=cache) for _ in range(20)], 1, options.device)[0]

    ways = {
        "forward": lambda: best(forward, 1, options.device)[0],
        "forward + backward": lambda: best(train, 1, options.device)[0],
        "20 cached steps": decode,
    }
    seconds = {(name, with_moca): [] for name in ways for with_moca in (False, True)}
    saved = {}
    for pair in range(options.pairs + 1):
        for with_moca in (False, True) if pair % 2 else (True, False):
            if with_moca:
                inject_moca(model)
                extra = sum(p.numel() for p in moca_parameters(model))
            for name, way in ways.items():
                elapsed = way()
                if pair:  # the first round warms up
                    seconds[name, with_moca].append(elapsed)
            if not pair:
                saved[with_moca] = saved_bytes(loss) / 2**20
            if with_moca:
                remove_moca(model)
    vision = int((batch["input_ids"] == model.config.image_token_id).sum())
    print(f"{options.samples} x {options.length} tokens, {vision} of them vision; {extra} parameters added")
    for name in ways:
        pairs = list(zip(seconds[name, False], seconds[name, True], strict=True))
        plain, calibrated = (min(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(with_moca / without for without, with_moca in pairs)
        print(f"{name:<20}{plain:>9.3f} s{calibrated:>9.3f} s with MoCa, ratio {ratio:.3f}")
    ratio = saved[True] / saved[False]
    print(
        f"{'saved for backward':<20}{saved[False]:>7.0f} MiB{saved[True]:>7.0f} MiB with MoCa, ratio {ratio:.3f}"
    )


if __name__ == "__main__":
    main()
