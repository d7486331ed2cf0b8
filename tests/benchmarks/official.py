"""The released script's two modes, re-stated from their formulas, on the hidden states our metric sees.

    python -m tests.benchmarks.official [--samples 60] [--length 256]

Also torchmetrics' FID arithmetic on the moments our metric ends with, what the default mode comes to in exact
arithmetic (docs/published_numbers.md), and how far rounding moves it. All on the packaged model, one process:
distance, time and memory by way, then where the gap is, layer by layer.
"""

import argparse
import time

import numpy as np
import scipy.linalg
import torch

from mir_lightning.functional import frechet_distance
from mir_lightning.functional.mir import clean_tokens
from mir_lightning.metrics import ModalityIntegrationRate
from mir_lightning.vlm import token_masks
from tests.benchmarks.evaluation import build_model, build_probe


def _hidden_states(model, probe):
    """Vision and text tokens by layer, all in memory, as the script keeps them."""
    batches = []
    for batch in probe:
        masks = token_masks(model.config, batch, "after_vision")
        with torch.no_grad():
            states = model(**batch, use_cache=False, logits_to_keep=1, output_hidden_states=True).hidden_states
        batches.append([(s[masks.vision], s[masks.text]) for s in states[1:]])
    return [[torch.cat(tokens) for tokens in zip(*layer, strict=True)] for layer in zip(*batches, strict=True)]


def _official_tokens(vision, text):
    """Scaled by the mean text norm; outliers replaced by the coordinate-wise median."""
    alpha = text.norm(dim=1).mean()
    for tokens in (vision / alpha, text / alpha):
        norms = tokens.norm(dim=1)
        bad = (norms - norms.median()).abs() > 3 * norms.std()
        yield torch.where(bad[:, None], tokens.median(dim=0).values, tokens)


def accurate(vision, text):
    v, t = (x.numpy() for x in _official_tokens(vision, text))
    cov_v, cov_t = np.cov(v, rowvar=False, dtype=np.float32), np.cov(t, rowvar=False, dtype=np.float32)
    root = scipy.linalg.sqrtm(cov_v @ cov_t).real
    return ((v.mean(0) - t.mean(0)) ** 2).sum() + np.trace(cov_v + cov_t - 2 * root)


def fast(vision, text):
    v, t = _official_tokens(vision, text)
    cov_v, cov_t = torch.cov(v.T), torch.cov(t.T)
    product = cov_v @ cov_t
    y, z = product, torch.eye(len(product))
    for _ in range(5):
        y = (y + torch.linalg.inv(z) @ product) / 2
        z = (z + torch.linalg.inv(y) @ product) / 2
    return ((v.mean(0) - t.mean(0)) ** 2).sum() + (cov_v + cov_t - 2 * y).trace()


def _moments(vision, text):
    """``(scale, mean_v, cov_v, mean_t, cov_t)`` of what the paper's rule leaves, float64."""
    clean = clean_tokens(vision, text, "paper", 0)
    v, t = clean.vision.double(), clean.text.double()
    return clean.scale, v.mean(0), torch.cov(v.T), t.mean(0), torch.cov(t.T)


def _fid(scale, mean_v, cov_v, mean_t, cov_t):
    """The arithmetic of torchmetrics' FID."""
    cross = torch.linalg.eigvals(cov_v @ cov_t).sqrt().real.sum()
    return ((mean_v - mean_t).square().sum() + cov_v.trace() + cov_t.trace() - 2 * cross) * scale**2


def _ours(scale, *moments):
    return frechet_distance(*moments) * scale**2


def _closed_form(breakdown):
    """The default mode without its cross term, which is next to nothing: means and spreads alone."""
    return sum((layer.mean_gap + layer.total_variance.sum()).item() for layer in breakdown)


def _permuted(vision, text, seed):
    generator = torch.Generator().manual_seed(seed)
    return (tokens[torch.randperm(len(tokens), generator=generator)] for tokens in (vision, text))


def _timed(ways, layers):
    for name, way in ways.items():
        start = time.perf_counter()
        distances = [float(way(layer)) for layer in range(layers)]
        yield name, (time.perf_counter() - start) / layers, sum(distances)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    model, probe = build_model(), build_probe(options.samples, options.length)
    tokens = _hidden_states(model, probe)
    metric = ModalityIntegrationRate(len(tokens), tokens[0][0].shape[1])
    start = time.perf_counter()
    for layer, (vision, text) in enumerate(tokens):
        for v, t in zip(vision.tensor_split(len(probe)), text.tensor_split(len(probe)), strict=True):
            metric.update(v, t, layer=layer)
    adding = (time.perf_counter() - start) / len(tokens)
    breakdown = metric.compute_breakdown()
    moments = [_moments(*layer) for layer in tokens]
    ways = {
        "ours, paper": lambda layer: _ours(*moments[layer]),
        "FID arithmetic, our moments": lambda layer: _fid(*moments[layer]),
        "script, accurate": lambda layer: accurate(*tokens[layer]),
        "script, fast (its default)": lambda layer: fast(*tokens[layer]),
    }
    print(f"{'':<30}{'MIR':>8}{'sum FD':>10}{'s a layer':>11}")
    for name, seconds, total in _timed(ways, len(tokens)):
        print(f"{name:<30}{np.log10(total):>8.4f}{total:>10.4f}{seconds:>11.3f}")
    replacing = ModalityIntegrationRate(len(tokens), tokens[0][0].shape[1], variant="official")
    for layer, (vision, text) in enumerate(tokens):
        replacing.update(vision, text, layer=layer)
    for name, layers in (("paper", breakdown), ("official", replacing.compute_breakdown())):
        print(f"mean gap and both spreads, from the result of {name!r}: MIR {np.log10(_closed_form(layers)):.4f}")
    for seed in range(3):
        total = sum(float(fast(*_permuted(*layer, seed))) for layer in tokens)
        print(f"script, fast, the same tokens in another order: MIR {np.log10(total):.4f}")
    print(f"adding a layer's tokens to our metric takes {adding:.3f} s")
    held = sum(t.nbytes for name in metric._defaults for t in getattr(metric, name))
    script = sum(t.nbytes for layer in tokens for t in layer)
    print(f"held at once: ours {held / 2**20:.0f} MiB, the script {script / 2**20:.0f} MiB\n")
    print(f"{'layer':>5}{'distance':>10}{'mean gap':>10}{'cov gap':>10}{'rank v':>8}{'rank t':>8}{'outliers':>12}")
    for number, layer in enumerate(breakdown, 1):
        ranks, outliers = layer.effective_rank.tolist(), [int(count) for count in layer.outliers]
        print(
            f"{number:>5}{layer.distance:>10.4f}{layer.mean_gap:>10.4f}{layer.cov_gap:>10.4f}"
            f"{ranks[0]:>8.1f}{ranks[1]:>8.1f}{f'{outliers[0]} + {outliers[1]}':>12}"
        )


if __name__ == "__main__":
    main()
