"""Time and memory of ``ModalityIntegrationRate``: adding tokens, and finalising a layer.

    python -m tests.benchmarks.accumulation [--width 576] [--layers 2] [--samples 60] [--vision 144] [--text 112]
        [--dtype bfloat16] [--accumulator float64] [--device cpu]

For a 7B model on a GPU: ``--width 4096 --layers 32 --samples 100 --vision 576 --text 824 --device cuda``. Tokens
are random with a few massive ones; a batch holds four samples. Adding is compared with the same number of tokens
in one bare matrix product of the covariance's size, ``[d, n] @ [n, d]`` in float64.
"""

import argparse

import torch

from mir_lightning.metrics import ModalityIntegrationRate
from mir_lightning.metrics.cloud import Cloud
from mir_lightning.metrics.moments import packed_size
from tests.benchmarks.timing import best

SAMPLES_PER_BATCH = 4


def _tokens(n, options, seed):
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.logspace(0, -2, options.width)
    tokens = torch.randn(n, options.width, generator=generator) * spectrum
    tokens[:: max(1, n // 2)] *= 100
    return tokens.to(options.device, getattr(torch, options.dtype))


def _feed(metric, batches):
    for vision, text in batches:
        for layer in range(metric.num_layers):
            metric.update(vision, text, layer=layer)


def _state_bytes(metric):
    kinds = dict.fromkeys(Cloud.STATES, 0)
    for name in metric._defaults:
        kinds[name.rsplit("_", 1)[1]] += sum(tensor.nbytes for tensor in getattr(metric, name))
    return kinds


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("width", 576), ("layers", 2), ("samples", 60), ("vision", 144), ("text", 112)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--accumulator", default="float64")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    d, layers = options.width, options.layers
    sizes = (SAMPLES_PER_BATCH * options.vision, SAMPLES_PER_BATCH * options.text)
    batches = [
        [_tokens(n, options, 2 * index + modality) + 0.1 * modality for modality, n in enumerate(sizes)]
        for index in range(options.samples // SAMPLES_PER_BATCH)
    ]
    accumulator = getattr(torch, options.accumulator)
    metric = ModalityIntegrationRate(layers, d, accumulator=accumulator).to(options.device)

    double = torch.cat(batches[0]).double()
    bare, _ = best(lambda: double.T @ double, 5, options.device)
    _feed(metric, batches)
    metric.reset()
    adding, _ = best(lambda: _feed(metric, batches), 1, options.device)
    adding /= layers * len(batches)
    kinds = _state_bytes(metric)
    finalising, _ = best(lambda: metric._layer_distance(0), 2, options.device)
    rate = 2 * len(double) * d**2

    print(f"d = {d}, {layers} layers, {options.samples} samples of {options.vision} + {options.text} tokens")
    print(f"{'bare product, a batch and layer':<40}{bare * 1e3:>10.2f} ms {rate / bare / 1e9:>10.0f} GFLOP/s")
    print(f"{'adding, a batch and layer':<40}{adding * 1e3:>10.2f} ms {adding / bare:>10.2f} of the product")
    print(f"{'adding, all':<40}{adding * layers * len(batches):>10.2f} s")
    print(f"{'finalising, a layer':<40}{finalising:>10.3f} s")
    formula = 2 * layers * (packed_size(d) * accumulator.itemsize + 8 * (d + 1))
    print(f"{'formula for mean and covariance':<40}{formula / 2**20:>10.1f} MiB")
    for kind, size in kinds.items():
        print(f"{f'held: {kind}':<40}{size / 2**20:>10.1f} MiB")
    everything = layers * sum(tokens.nbytes for batch in batches for tokens in batch)
    print(f"{'all tokens, as the script keeps them':<40}{everything / 2**20:>10.1f} MiB")


if __name__ == "__main__":
    main()
