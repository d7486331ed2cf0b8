import pytest
import torch

from mir_lightning.probing.ranks import fit_into_memory, run_together
from tests.distributed import run_on_ranks


def _errors(rank, world):
    """Out of memory on rank 0 alone; the same, and another trouble on rank 1."""
    tried, raised = [], []
    for other in (None, ValueError("broken")):

        def run(size, other=other):
            def step(index, counts):
                if rank == 0 and size > 2:
                    raise torch.OutOfMemoryError("too large")
                if rank == 1 and other is not None:
                    raise other

            tried.append(size)
            run_together(world, step, distributed=True, device=torch.device("cpu"))

        try:
            fit_into_memory(run, 4, lambda size: size // 2 or None)
        except Exception as error:
            raised.append(f"{type(error).__name__}: {error}")
    return tried, raised


def test_all_ranks_try_smaller_or_none_does():
    first, second = run_on_ranks(_errors, 2)
    assert first == ([4, 2, 4], ["RuntimeError: on rank 1: broken"])
    assert second == ([4, 2, 4], ["ValueError: broken"])


def test_one_process_raises_at_once():
    with pytest.raises(KeyError, match="first"):
        run_together(3, lambda index, counts: {}["first"], distributed=False, device=torch.device("cpu"))
