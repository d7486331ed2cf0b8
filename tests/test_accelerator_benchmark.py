"""The benchmark for accelerators runs, at tiny sizes on the devices at hand."""

import math
import re

from tests.benchmarks import accelerator


def test_it_prints_all_that_decides(device, capsys):
    accelerator.main(["--small", "--device", device.type])
    printed = capsys.readouterr().out
    values = {line[:56].strip(): float(line[56:68]) for line in printed.splitlines()[1:]}
    gpu_only = {"waits for the device, an update", "peak memory"}
    assert len(values) == 1 + 2 + 2 * 2 + len(gpu_only)
    for name, value in values.items():
        assert value > 0 or (device.type == "cpu" and name in gpu_only and math.isnan(value))
    errors = [float(error) for error in re.findall(r"error (\S+?),?(?: |\n|$)", printed)]
    assert len(errors) == 2 + 2 * 2
    assert max(map(abs, errors)) < 1e-5
