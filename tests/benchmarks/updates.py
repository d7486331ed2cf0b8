"""What an update of ``ModalityIntegrationRate`` costs after ten updates, and after a thousand.

    python -m tests.benchmarks.updates [--width 64] [--updates 1000] [--tokens 2304] [--device cpu]

Two metrics take the same tokens in turn: one as it is, and one that judges the norms of all tokens seen at each
update. Each line compares the mean of some updates with that of the first ten, after one that does not count.
"""

import argparse
import time

import torch

from mir_lightning.metrics import ModalityIntegrationRate, cloud
from tests.benchmarks.timing import wait_for


def _seconds(metric, tokens, growth, device):
    cloud._GROWTH = growth
    wait_for(device)
    start = time.perf_counter()
    metric.update(tokens, tokens[:0], layer=0)
    wait_for(device)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("width", 64), ("updates", 1000), ("tokens", 2304)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    ways = {"as it is": cloud._GROWTH, "judging all at each update": 1 + 1e-9}
    metrics = [ModalityIntegrationRate(1, options.width) for _ in ways]
    seconds = [[] for _ in ways]
    for _ in range(options.updates + 1):
        tokens = torch.randn(options.tokens, options.width, generator=generator).to(options.device)
        for metric, growth, found in zip(metrics, ways.values(), seconds, strict=True):
            found.append(_seconds(metric, tokens, growth, options.device))
    print(f"{'milliseconds an update':<24}" + "".join(f"{name:>30}" for name in ways))
    for begin, end in ((1, 11), (11, 101), (101, options.updates + 1)):
        means = [sum(found[begin:end]) / (end - begin) for found in seconds]
        first = [sum(found[1:11]) / 10 for found in seconds]
        columns = [f"{1e3 * mean:.2f} ({mean / of:.2f} x)" for mean, of in zip(means, first, strict=True)]
        print(f"{f'{begin} to {end - 1}':<24}" + "".join(f"{column:>30}" for column in columns))
    totals = [sum(found[1:]) for found in seconds]
    print(f"all of them: {totals[1] / totals[0]:.1f} x as long where all are judged at each update")


if __name__ == "__main__":
    main()
