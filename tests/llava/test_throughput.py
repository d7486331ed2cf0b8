import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mir_lightning.callbacks.base import ProbingCallback
from mir_lightning.callbacks.schedule import Schedule
from mir_lightning.llava.schedule import Part, Stage, freeze_all_but
from mir_lightning.llava.throughput import Throughput, TimedLoader, training_flops
from mir_lightning.report import read_run
from mir_lightning.vlm import token_masks
from tests.families import build_family, family_batch
from tests.training import fit


@pytest.mark.parametrize(
    "parts",
    [
        [Part("projector", 1.0)],
        [Part("projector", 1.0), Part("llm", 1.0)],
        [Part("projector", 1.0), Part("llm", 1.0), Part("vision", 1.0)],
    ],
    ids=["projector", "llm", "all"],
)
def test_operations_of_a_step_are_those_that_torch_counts(parts):
    model, batch = build_family("llava"), family_batch("llava")
    model.set_attn_implementation("eager")  # the others are not counted on CPU
    freeze_all_but(model, Stage(parts))
    labels = batch["input_ids"]
    with FlopCounterMode(display=False) as counter:
        model(**batch, labels=labels, use_cache=False).loss.backward()
    vision = token_masks(model.config, batch, "all").vision
    ours = training_flops(model).of_batch({**batch, "labels": labels}, vision)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_loader_counts_waiting_and_not_working():
    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            time.sleep(0.02)
            return index

    loader = TimedLoader(Slow(), batch_size=2)
    assert loader.waited == 0
    for _ in loader:
        time.sleep(0.05)
    assert 0.08 <= loader.waited < 0.12


class SlowProbe(ProbingCallback):
    """Takes a third of a second after each step."""

    label, best = "Slow", "min"

    def __init__(self):
        super().__init__(Schedule(1), False, False, "slow", "raise", None, False)

    def _prepare(self, pl_module):
        return "none", {}

    def _measure(self, trainer, pl_module):
        time.sleep(0.3)
        return SimpleNamespace(seconds=0.3)

    def _values(self, result):
        return {}

    def _point(self, result, step):
        return {"step": step, "seconds": 0.3}

    def _draw(self, trainer, result):
        pass


@pytest.mark.parametrize("first", [True, False])
def test_the_time_of_probes_counts_neither_as_training_nor_as_waiting(tmp_path, first):
    callbacks = [Throughput(window_size=2), SlowProbe()]
    trainer, _ = fit(tmp_path, callbacks if first else callbacks[::-1])
    rows = read_run(tmp_path).curves
    probed = 0.3 * trainer.global_step
    assert rows["train/time"][-1][1] < probed / 2
    assert rows["train/device/batches_per_sec"][-1][1] > 1 / 0.3
    assert max(share for _, share in rows["train/data_wait"]) <= 1
