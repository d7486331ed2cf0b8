"""Run a function in several gloo processes."""

import socket
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank_main(rank, function, world, port, folder, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    try:
        torch.save(function(rank, world, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_on_ranks(function, world, *arguments):
    """Results of ``function(rank, world, *arguments)`` by rank.

    Once more where torch's own threads aborted the process, as FSDP2 over gloo rarely does.
    """
    try:
        return _spawn(function, world, arguments)
    except mp.ProcessExitedException as error:
        if error.signal_name != "SIGABRT":
            raise
        return _spawn(function, world, arguments)


def _spawn(function, world, arguments):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank_main, (function, world, port, folder, arguments), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]
