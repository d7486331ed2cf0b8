import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mir_lightning.llava.schedule import Part, Stage, freeze_all_but
from mir_lightning.llava.throughput import TimedLoader, training_flops
from mir_lightning.vlm import token_masks
from tests.families import build_family, family_batch


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
