"""What covariance products in float32 do to MIR: short blocks of centred tokens, summed in float64.

    python -m tests.benchmarks.float32_products [--tokens 9000] [--width 96]

Hostile tokens, and spectra of several decades with massive activations in two dimensions of an eighth of the
tokens, in bfloat16 and float32. Errors of MIR are relative to the metric's float64 products of the same tokens.
The last column has float32 accumulators, and with them what float32 takes for noise. The package has
no such option.
"""

import argparse
from contextlib import contextmanager

import torch

from mir_lightning.functional.frechet import full_float32
from mir_lightning.metrics import ModalityIntegrationRate, moments
from mir_lightning.metrics.mir import AccumulatedOutlierError
from tests.streams import KINDS, hostile_layers

DECADES = (1, 3, 5)
MASSIVE = (0, 100, 1000)


@contextmanager
def _blocks_of(size):
    """Products of so many rows in float32, instead of the metric's own."""
    plain = moments._add_outer

    def add(second, centred):
        total = torch.zeros_like(second)
        with full_float32(centred.device):
            for rows in centred.float().split(size):
                for block, packed in moments._blocks(centred.shape[1]):
                    total[packed].view(-1, block.stop).add_(rows[:, block].T @ rows[:, : block.stop])
        second.add_(total)

    moments._add_outer = add
    try:
        yield
    finally:
        moments._add_outer = plain


def spectra(decades, massive, tokens, width, dtype):
    """One layer of vision and text tokens."""
    generator, sides = torch.Generator().manual_seed(0), []
    for offset in (0.1, 0.0):
        side = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
        side = side * torch.logspace(0, -decades, width, dtype=torch.float64) + offset
        side[torch.randperm(tokens, generator=generator)[: tokens // 8], :2] += massive
        sides.append([side.to(dtype)])
    return sides


def _mir(sides, accumulator):
    metric = ModalityIntegrationRate(1, sides[0][0].shape[1], accumulator=accumulator)
    batches = [side[0].split(500) for side in sides]
    for pair in zip(*batches, strict=True):
        metric.update(*pair, layer=0)
    try:
        metric.compute()
    except AccumulatedOutlierError:
        metric.start_second_pass()
        for pair in zip(*batches, strict=True):
            metric.update(*pair, layer=0)
    assert metric.vision_0_moments
    return metric.compute().item()


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("tokens", 9000), ("width", 96)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    size = options.tokens, options.width
    print(f"{'':<44}{'blocks of 256':>16}{'of 512':>12}{'of 256, float32 noise':>26}")
    for dtype in (torch.bfloat16, torch.float32):
        clouds = {
            f"{decades} decades, massive {massive}": spectra(decades, massive, *size, dtype)
            for decades in DECADES
            for massive in MASSIVE
        }
        for kind in KINDS:
            if kind != "few_tokens":
                clouds[kind] = hostile_layers(kind, dtype, 1, options.tokens, options.tokens, options.width)
        for name, sides in clouds.items():
            exact = _mir(sides, torch.float64)
            found = []
            for rows, accumulator in ((256, torch.float64), (512, torch.float64), (256, torch.float32)):
                with _blocks_of(rows):
                    found.append(_mir(sides, accumulator) / exact - 1)
            print(f"{f'{dtype}, {name}':<44}{found[0]:>16.0e}{found[1]:>12.0e}{found[2]:>26.0e}", flush=True)


if __name__ == "__main__":
    main()
