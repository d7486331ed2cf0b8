"""A whole evaluation, ours against the released script's procedure: time and peak memory, as ratios.

    python -m tests.benchmarks.script [--samples 40] [--length 256]

The script's procedure: one sample at a time through ``generate``, every layer's hidden states kept, then its
distances. Packaged 135M model; each way in a process of its own, one after the other; memory is what a way's peak
adds to the loaded model.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from mir_lightning import evaluate_mir
from tests.benchmarks.evaluation import build_model, build_probe
from tests.benchmarks.official import accurate, fast


def _ours(model, probe, variant):
    return evaluate_mir(model, probe, variant).mir


def _script(model, probe, distance):
    layers = []
    for batch in probe:
        made = model.generate(
            **batch,
            attention_mask=torch.ones_like(batch["input_ids"]),
            max_new_tokens=1,
            do_sample=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        vision = batch["input_ids"][0] == model.config.image_token_id
        text = torch.arange(len(vision)) > vision.nonzero()[-1]
        layers.append([(state[0][vision], state[0][text]) for state in made.hidden_states[0][1:]])
    total = 0.0
    for layer in zip(*layers, strict=True):
        total += float(distance(*(torch.cat(tokens) for tokens in zip(*layer, strict=True))))
    return torch.tensor(total).log10().item()


WAYS = {
    "ours, paper": (4, lambda model, probe: _ours(model, probe, "paper")),
    "ours, official": (4, lambda model, probe: _ours(model, probe, "official")),
    "script, accurate": (1, lambda model, probe: _script(model, probe, accurate)),
    "script, fast": (1, lambda model, probe: _script(model, probe, fast)),
}


def _memory(field):
    """MiB of this process: ``VmRSS`` now, or ``VmHWM``, the peak since it was reset (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _forget_loading():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak


def _measure(way, samples, length):
    """In a fresh process: MIR, seconds, and MiB above the loaded model."""
    batch_size, run = WAYS[way]
    model, probe = build_model(), build_probe(samples, length, batch_size)
    _forget_loading()
    loaded, start = _memory("VmRSS"), time.perf_counter()
    mir = run(model, probe)
    seconds = time.perf_counter() - start
    print(json.dumps({"mir": mir, "seconds": seconds, "memory": _memory("VmHWM") - loaded}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        _measure(options.way, options.samples, options.length)
        return
    print(f"{'':<18}{'MIR':>8}{'seconds':>10}{'ratio':>8}{'MiB':>8}{'ratio':>8}")
    first = None
    for way in WAYS:
        command = [sys.executable, "-m", "tests.benchmarks.script", "--way", way]
        command += ["--samples", str(options.samples), "--length", str(options.length)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        first = first or found
        seconds, memory = (found[key] / first[key] for key in ("seconds", "memory"))
        print(
            f"{way:<18}{found['mir']:>8.4f}{found['seconds']:>10.1f}{seconds:>8.2f}"
            f"{found['memory']:>8.0f}{memory:>8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
