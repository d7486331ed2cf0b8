"""Time of ``trace_sqrt_product`` against the general ways to the same number.

    python -m tests.benchmarks.square_root [--width 2048] [--sqrtm]

Two full-rank covariances of 3 d tokens; the minimum of three runs each (scipy: one).
"""

import argparse
import time

import numpy as np
import scipy.linalg
import torch

from mir_lightning.functional import trace_sqrt_product


def _best(function, runs=3):
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        value = function()
        times.append(time.perf_counter() - start)
    return min(times), value


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--sqrtm", action="store_true", help="also scipy.linalg.sqrtm, which is slow")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    d = options.width
    spectrum = torch.logspace(0, -3, d, dtype=torch.float64)
    x = torch.randn(3 * d, d, generator=generator, dtype=torch.float64) * spectrum
    y = torch.randn(3 * d, d, generator=generator, dtype=torch.float64)
    x, y = torch.cov(x.T), torch.cov(y.T)
    ways = {
        "trace_sqrt_product": lambda: trace_sqrt_product(x, y).item(),
        "eigvals of the product": lambda: torch.linalg.eigvals(x @ y).sqrt().real.sum().item(),
    }
    results = {name: _best(way) for name, way in ways.items()}
    if options.sqrtm:
        results["scipy.linalg.sqrtm"] = _best(lambda: np.trace(scipy.linalg.sqrtm((x @ y).numpy()).real), 1)
    ours, exact = results["trace_sqrt_product"]
    print(f"{f'd = {d}':<26}{'seconds':>9}{'ratio':>8}{'difference':>12}")
    for name, (seconds, value) in results.items():
        print(f"{name:<26}{seconds:>9.3f}{seconds / ours:>8.1f}{value / exact - 1:>12.1e}")


if __name__ == "__main__":
    main()
