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
