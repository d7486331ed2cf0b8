"""The minimum time of several runs of a function, on any device."""

import time

import torch


def best(function, runs=3, device="cpu"):
    """``(seconds, value)``: the least time of ``runs``, and what the last run returned."""
    times, value = [], None
    for _ in range(runs):
        _wait_for(device)
        start = time.perf_counter()
        value = function()
        _wait_for(device)
        times.append(time.perf_counter() - start)
    return min(times), value


def _wait_for(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
