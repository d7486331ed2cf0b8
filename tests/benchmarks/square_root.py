"""Time of ``trace_sqrt_product`` against the general ways to the same number, and of a whole layer's distance.

    python -m tests.benchmarks.square_root [--widths 576 2048] [--sqrtm] [--device cpu]

Two full-rank covariances of 3 d tokens, one with a spectrum over six decades; the minimum of three runs each
(scipy: one). "eigvals of the product" is the arithmetic of torchmetrics' FID.
"""

import argparse

import numpy as np
import scipy.linalg
import torch

from mir_lightning.functional import trace_sqrt_product
from mir_lightning.functional.frechet import Gaussian, frechet_gaps
from mir_lightning.functional.mir import layer_distance
from tests.benchmarks.timing import best


def _moments(d, device):
    generator = torch.Generator().manual_seed(0)
    found = []
    for decades in (3, 0):
        tokens = torch.randn(3 * d, d, generator=generator, dtype=torch.float64)
        tokens = (tokens * torch.logspace(0, -decades, d, dtype=torch.float64)).to(device)
        found.append((tokens.mean(0), torch.cov(tokens.T)))
    return found


def _compare(d, device, sqrtm):
    (mean_x, x), (mean_y, y) = _moments(d, device)
    ways = {
        "exact": lambda: trace_sqrt_product(x, y, "exact").item(),
        "newton_schulz": lambda: trace_sqrt_product(x, y, "newton_schulz").item(),
        "eigvals of the product": lambda: torch.linalg.eigvals(x @ y).sqrt().real.sum().item(),
    }
    results = {name: best(way, device=device) for name, way in ways.items()}
    if sqrtm:
        product = (x @ y).cpu().numpy()
        results["scipy.linalg.sqrtm"] = best(lambda: np.trace(scipy.linalg.sqrtm(product).real), 1)
    ours, exact = results["exact"]
    print(f"{f'd = {d}':<36}{'seconds':>9}{'ratio':>8}{'difference':>12}")
    for name, (seconds, value) in results.items():
        print(f"{name:<36}{seconds:>9.3f}{seconds / ours:>8.1f}{value / exact - 1:>12.1e}")
    gaussians = [lambda: Gaussian(mean_x, x), lambda: Gaussian(mean_y, y)]
    seconds, _ = best(lambda: torch.stack(frechet_gaps(*(g() for g in gaussians))), 2, device)
    print(f"{'a layer: its distance':<36}{seconds:>9.3f}")
    seconds, _ = best(lambda: _layer(*(g() for g in gaussians), d), 2, device)
    print(f"{'a layer: and both effective ranks':<36}{seconds:>9.3f}\n")


def _layer(x, y, d):
    norms = (torch.ones(()).to(x.mean), torch.ones(()).to(x.mean))
    return layer_distance((pair := (x, y)), pair, norms, (3 * d, 3 * d), (0, 0), (0, 0))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 2048])
    parser.add_argument("--sqrtm", action="store_true", help="also scipy.linalg.sqrtm, which is slow")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for width in options.widths:
        _compare(width, options.device, options.sqrtm)


if __name__ == "__main__":
    main()
