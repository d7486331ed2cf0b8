"""What an update costs, counted in tensor operations rather than seconds."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mir_lightning.metrics import ModalityIntegrationRate
from tests import oracle


class _Elements(TorchDispatchMode):
    """Counts the elements that operations make anew."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += sum(leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor))
        return found


def _stream(updates, width=4, tokens=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, width, generator=generator) + 1 for _ in range(updates)]


@pytest.mark.parametrize("options", [{}, {"compute_on_cpu": True}])
def test_an_update_costs_no_more_after_a_thousand_updates(options):
    """Of nothing but norms, nearly: the tokens have four dimensions."""
    metric = ModalityIntegrationRate(1, 4, **options)
    batches = _stream(1500)
    made, lengths = [], []
    for tokens in batches:
        with _Elements() as elements:
            metric.update(tokens, tokens[:0], layer=0)
        made.append(elements.count)
        lengths.append(max(len(getattr(metric, name)) for name in ("vision_0_norms", "vision_0_classes")))
    accumulating = next(i for i, length in enumerate(lengths) if length)
    few, many = (sum(made[begin:end]) for begin, end in ((accumulating + 10, accumulating + 110), (1000, 1500)))
    assert many / 500 < 1.25 * few / 100
    assert max(lengths) <= math.log2(len(batches) * len(tokens))
    metric.update(tokens, batches[0], layer=0)
    expected = oracle.mir([torch.cat([*batches, tokens]).double().numpy()], [batches[0].double().numpy()])
    assert metric.compute().item() == pytest.approx(expected, rel=1e-8)
