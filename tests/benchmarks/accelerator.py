"""What decides arithmetic and square root on an accelerator, beside the bare forward of a 7B model's decoder.

    python -m tests.benchmarks.accelerator [--device cuda] [--layers 4] [--small]

A decoder of random bfloat16 weights, LLaMA-7B's shape with fewer layers, is timed and extrapolated to 32. Then,
for one layer's tokens: accumulating them by products in float64 and in float32; finalising by method; how often
an update waits for the device; peak memory; and errors relative to float64. ``--small`` runs the same at tiny
sizes, in seconds.
"""

import argparse
import warnings
from functools import partial

import torch
from transformers import LlamaConfig, LlamaModel

from mir_lightning.functional.frechet import newton_schulz_trace, trace_sqrt_product
from mir_lightning.metrics import ModalityIntegrationRate
from tests.benchmarks.timing import best, wait_for

LAYERS = 32


def _report(what, value, beside=""):
    print(f"{what:<56}{value:>12.4g}  {beside}", flush=True)


def _forward(options, device):
    """Seconds of a batch of pairs, of all layers."""
    d = options.widths[-1] if options.small else 4096
    shape = {"intermediate_size": 11008 * d // 4096, "num_attention_heads": max(1, d // 128), "vocab_size": 32}
    config = LlamaConfig(hidden_size=d, num_hidden_layers=options.layers, **shape)
    with torch.device(device):
        model = LlamaModel(config).bfloat16().eval()
        states = torch.randn(options.pairs, options.length, d, dtype=torch.bfloat16)
    with torch.no_grad():
        seconds, _ = best(lambda: model(inputs_embeds=states, use_cache=False), 3, device)
    return seconds * LAYERS / options.layers, d


def _tokens(n, d, device):
    """bfloat16, a spectrum of four decades, a few large means, and massive activations in two dimensions."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(n, d, generator=generator) * torch.logspace(0, -4, d)
    tokens[:, -4:] += 30
    tokens[:: n // 4, :2] += 1000
    return tokens.bfloat16().to(device)


def _accumulating(options, device, d, forward):
    tokens = _tokens(options.pairs * options.length, d, device)
    half, exact = len(tokens) // 2, None
    for products in (torch.float64, torch.float32):
        metric = ModalityIntegrationRate(1, d, products=products).to(device)
        update = partial(metric.update, tokens[:half], tokens[half:], layer=0)
        while not (metric.vision_0_moments and metric.text_0_moments):
            update()
        seconds, _ = best(update, 3, device)
        second = metric.vision_0_moments[1].cpu()
        exact = second if exact is None else exact
        error = (second - exact).norm() / exact.norm()
        beside = f"s a layer; {seconds * LAYERS / forward:.2f} forwards, error {error:.0e}"
        _report(f"accumulating, {str(products).removeprefix('torch.')} products", seconds, beside)
    _report("waits for the device, an update", _waits(update, device))


def _waits(update, device):
    """How often, as CUDA's own debug mode sees it; nan elsewhere."""
    if device.type != "cuda":
        return float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def _finalising(d, device):
    generator = torch.Generator().manual_seed(0)
    sides = []
    for decades in (3, 0):
        side = torch.randn(3 * d, d, generator=generator) * torch.logspace(0, -decades, d)
        sides.append(torch.cov(side.to(device).double().T))
    exact = trace_sqrt_product(*(side.cpu() for side in sides)).item()
    for method in ("exact", "newton_schulz"):
        seconds, found = best(lambda method=method: trace_sqrt_product(*sides, method).item(), 2, device)
        steps = f", {newton_schulz_trace(*sides).steps} steps" if method == "newton_schulz" else ""
        _report(f"finalising, d = {d}, {method}", seconds, f"s a layer; error {found / exact - 1:.0e}{steps}")


def main(words=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder that is timed")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(words)
    options.widths, options.pairs, options.length = (2048, 4096, 5120), 4, 640
    if options.small:
        options.widths, options.pairs, options.length, options.layers = (64, 128), 2, 96, 1
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; {options.pairs} pairs of {options.length} tokens")
    forward, d = _forward(options, device)
    _report(f"bare forward of {LAYERS} layers, d = {d}", forward, f"s, from {options.layers} layers")
    _accumulating(options, device, d, forward)
    for width in options.widths:
        _finalising(width, device)
    wait_for(device)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else float("nan")
    _report("peak memory", peak, "MiB")


if __name__ == "__main__":
    main()
