"""The minimum time of several runs of a function, on any device."""

import time

import torch


def best(function, runs=3, device="cpu"):
    """``(seconds, value)``: the least time of ``runs``, and what the last run returned."""
    times, value = [], None
    for _ in range(runs):
        wait_for(device)
        start = time.perf_counter()
        value = function()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return min(times), value


def wait_for(device):
    """Until what was queued on it is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
