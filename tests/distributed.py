"""Run a function in several gloo processes."""

import multiprocessing
import socket
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once a test process: the ranks are forked from a server that has them.
multiprocessing.set_forkserver_preload(
    ["lightning.pytorch", "transformers", "peft", "mir_lightning", "tests.models"]
)


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
        arguments = (function, world, port, folder, arguments)
        mp.start_processes(_rank_main, arguments, nprocs=world, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]
