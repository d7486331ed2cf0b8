"""What covariance products in float32 do to MIR, summed in float64 and in float32.

    python -m tests.benchmarks.float32_products [--tokens 9000] [--width 96]

Hostile tokens, and spectra of several decades with massive activations in two dimensions of an eighth of the
tokens, in bfloat16 and float32. Errors of MIR are relative to the metric's float64 products of the same tokens.
"""

import argparse

import torch

from mir_lightning.metrics import ModalityIntegrationRate
from mir_lightning.metrics.mir import AccumulatedOutlierError
from tests.streams import KINDS, hostile_layers

DECADES = (1, 3, 6)
MASSIVE = (0, 100, 1000)


def spectra(decades, massive, tokens, width, dtype):
    """One layer of vision and text tokens."""
    generator, sides = torch.Generator().manual_seed(0), []
    for offset in (0.1, 0.0):
        side = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
        side = side * torch.logspace(0, -decades, width, dtype=torch.float64) + offset
        side[torch.randperm(tokens, generator=generator)[: tokens // 8], :2] += massive
        sides.append([side.to(dtype)])
    return sides


def _mir(sides, **dtypes):
    metric = ModalityIntegrationRate(1, sides[0][0].shape[1], **dtypes)
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
    print(f"{'':<44}{'float64 sums':>16}{'float32 sums':>16}")
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
            exact = _mir(sides)
            found = [_mir(sides, products=torch.float32, accumulator=a) for a in (torch.float64, torch.float32)]
            errors = "".join(f"{mir / exact - 1:>16.0e}" for mir in found)
            print(f"{f'{dtype}, {name}':<44}{errors}", flush=True)


if __name__ == "__main__":
    main()
