from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
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


@dataclass
class Size:
    height: int


def _contents():
    """Makers of values; two calls of one make equal contents, any two of them differ."""
    large = torch.zeros(1, 3, 32, 32)
    middle = large.clone()
    middle[..., 16, 16] = 1e-6
    palette = Image.new("P", (4, 4))
    palette.putpalette([1, 2, 3] * 256)
    return {
        "tensors": [large],
        "a tensor that differs in the middle": [middle],
        "a tuple": (large,),
        "arrays": [large.numpy()],
        "texts": {"a": "x", "b": "y"},
        "texts the other way": {"a": "y", "b": "x"},
        "a dataclass": Size(3),
        "another one": Size(4),
        "a number": 3,
        "a float": 3.0,
        "a text": "3",
        "nothing": None,
        "a picture": Image.new("RGB", (4, 4), (1, 2, 3)),
        "another colour": Image.new("RGB", (4, 4), (1, 2, 4)),
        "a palette": palette,
    }


def test_the_fingerprint_is_of_contents_whatever_they_are_made_of():
    prints = [
        {name: Probe([{**tiny_batch(), "extra": value}]).fingerprint for name, value in _contents().items()}
        for _ in range(2)
    ]
    assert prints[0] == prints[1]
    assert len(set(prints[0].values())) == len(prints[0])


@pytest.mark.parametrize("value", [object(), lambda: 0, np.array([object()])], ids=["object", "function", "array"])
def test_contents_that_cannot_be_told_apart_are_refused_by_name(value):
    with pytest.raises(TypeError, match=r"probe: extra\[1\] holds a \w+, whose contents .* tensors, arrays"):
        _ = Probe([{**tiny_batch(), "extra": [1, value]}]).fingerprint


def test_tensors_that_share_memory_are_saved(tmp_path):
    ids = torch.arange(12).view(3, 4)
    probe = Probe([{"input_ids": ids, "labels": ids}, {"input_ids": ids[1:], "labels": ids[1:]}])
    probe.save(tmp_path / "probe.safetensors")
    assert Probe.load(tmp_path / "probe.safetensors")[0].fingerprint == probe.fingerprint


def test_equal_contents_have_one_fingerprint_and_others_another(tmp_path):
    def of(value):
        return Probe([{"input_ids": torch.ones(1, 2, dtype=torch.long), "x": value}]).fingerprint

    noise = Image.effect_noise((8, 8), 50)
    noise.save(tmp_path / "a.png")
    assert of(noise) == of(Image.open(tmp_path / "a.png"))
    assert of({"a": 1}) == of(UserDict({"a": 1}))
    assert of(np.array(1.0)) != of(np.array([1.0]))
    turned = torch.ones(2, dtype=torch.complex64).conj()
    assert of(turned) == of(turned.resolve_conj())
    with pytest.raises(TypeError, match="x holds a tensor whose contents cannot be read"):
        of(torch.eye(2).to_sparse())
