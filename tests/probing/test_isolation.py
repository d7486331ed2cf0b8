import random

import numpy as np
import pytest
import torch

from mir_lightning.probing.isolation import leave_no_trace


def _draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


@pytest.mark.parametrize("fails", [False, True])
def test_random_numbers_drawn_inside_do_not_move_those_outside(fails):
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())

    def look():
        with leave_no_trace(model):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            _draws()
            if fails:
                raise RuntimeError("inside")

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = _draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    if fails:
        with pytest.raises(RuntimeError, match="inside"):
            look()
    else:
        look()
    assert _draws() == expected
    assert [m.training for m in model.modules()] == [True, True, False]
    assert torch.is_grad_enabled()


class Remembering(torch.nn.Module):
    """Replaces what it keeps in every forward, as dynamic RoPE does, and makes something new."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.ones(3))
        self.longest = 4
        self.deltas = torch.zeros(2)

    def forward(self):
        self.frequencies = self.frequencies / 2
        self.longest *= 2
        self.deltas = self.deltas + 1
        self.scale, self.latest = 3.0, torch.ones(1)


def test_what_a_forward_replaces_is_put_back_and_what_it_makes_is_taken_away():
    module = Remembering()
    kept = (module.frequencies, module.longest, module.deltas)
    names = set(vars(module))
    with leave_no_trace(module):
        module()
        module()
    assert (module.frequencies is kept[0], module.longest, module.deltas is kept[2]) == (True, 4, True)
    assert set(vars(module)) == names
    assert set(dict(module.named_buffers())) == {"frequencies"}


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(3))
        self.said, self.seen, self.last = "before", [1], 5

    def forward(self):
        self.count += 1
        self.said, self.seen, self.last, self.new = "after", [1, 2], None, {}


def test_what_a_forward_counts_or_says_is_as_before():
    model = Counting()
    model()
    model.said, model.seen, model.last = "before", [1], 5
    before = {**vars(model)}
    with leave_no_trace(model):
        model()
    assert model.count.tolist() == [1, 1, 1]
    assert (model.said, model.last) == ("before", 5)
    assert model.seen is before["seen"]
