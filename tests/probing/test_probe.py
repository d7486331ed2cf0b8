import pytest
import torch
from torch.utils.data import DataLoader

from mir_lightning.probing import Probe
from tests.models import tiny_batch


def test_fingerprint_tells_contents_apart():
    reference = Probe([tiny_batch()])
    assert Probe([tiny_batch()]).fingerprint == reference.fingerprint
    changed = tiny_batch()
    changed["pixel_values"][0, 0, 0, 0] += 1e-3
    renamed = tiny_batch()
    renamed["pixels"] = renamed.pop("pixel_values")
    prints = {reference.fingerprint, Probe([changed]).fingerprint, Probe([renamed]).fingerprint}
    prints.add(Probe([tiny_batch()] * 2).fingerprint)
    prints.add(
        Probe([{k: v.double() if v.is_floating_point() else v for k, v in tiny_batch().items()}]).fingerprint
    )
    assert len(prints) == 5


def test_from_data_loader_callable_and_bfloat16():
    samples = [{k: v[0] for k, v in tiny_batch(seed=s, batch=1).items()} for s in range(4)]
    loader = DataLoader(samples, batch_size=2)
    assert len(Probe(loader)) == 2
    assert (
        Probe.of(lambda: loader).fingerprint == Probe.of(loader).fingerprint == Probe.of(Probe(loader)).fingerprint
    )
    assert Probe([{**tiny_batch(), "pixel_values": torch.zeros(1, dtype=torch.bfloat16)}]).fingerprint


def test_a_batch_taken_out_can_be_changed_without_harm():
    probe = Probe([tiny_batch()])
    next(iter(probe)).pop("labels")
    assert "labels" in next(iter(probe))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches is empty"),
        (tiny_batch(), TypeError, "got dict .put a single batch into a list"),
        (7, TypeError, "iterable of dicts of tensors, got int"),
        ([torch.zeros(3)], TypeError, "batch 0 of the probe must be a dict, got Tensor"),
        ([{"pixel_values": torch.zeros(3)}], ValueError, r'needs "input_ids".*pixel_values'),
        ([{"input_ids": torch.zeros(3)}], ValueError, r"a tensor \[B, S\]"),
    ],
)
def test_bad_batches(batches, error, message):
    with pytest.raises(error, match=message):
        Probe(batches)
