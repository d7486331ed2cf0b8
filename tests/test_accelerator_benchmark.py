"""The benchmark for accelerators runs, at tiny sizes on the devices at hand, and its arithmetics are right."""

import math
import re

import numpy as np
import torch

from tests.benchmarks import accelerator


def test_it_prints_all_that_decides(device, capsys):
    accelerator.main(["--small", "--device", device.type])
    printed = capsys.readouterr().out
    values = {line[:56].strip(): float(line[56:68]) for line in printed.splitlines()[1:]}
    gpu_only = {"waits for the device, an update", "peak memory"}
    assert len(values) == 1 + 3 + 2 * 2 + len(gpu_only)
    for name, value in values.items():
        assert value > 0 or (device.type == "cpu" and name in gpu_only and math.isnan(value))
    errors = [float(error) for error in re.findall(r"error (\S+?),?(?: |\n|$)", printed)]
    assert len(errors) == 2 + 2 * 2
    assert max(map(abs, errors)) < 1e-5


def test_its_products_are_the_centred_second_moment():
    tokens = accelerator._tokens(700, 24, "cpu")
    rows = tokens.double().numpy()
    expected = np.cov(rows.T) * (len(rows) - 1)
    assert torch.equal(accelerator.float32_blocks(tokens, 100), accelerator.float32_blocks(tokens, 100))
    for found, rel in ((accelerator.float64_product(tokens), 1e-12), (accelerator.float32_blocks(tokens), 1e-6)):
        assert np.linalg.norm(found.numpy() - expected) < rel * np.linalg.norm(expected)
