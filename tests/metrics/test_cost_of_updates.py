"""What an update costs, counted in tensor operations rather than seconds."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mir_lightning.metrics import ModalityIntegrationRate
from mir_lightning.probing import Probe
from mir_lightning.probing.network import Network
from tests import oracle
from tests.models import tiny_batch, tiny_llava


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


class _Waits(TorchDispatchMode):
    """Counts what waits for the device where there is one: numbers it is asked for, shapes it has to tell."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "bincount", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in self.NAMES or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class _Transfers(TorchFunctionMode):
    """Counts the transfers that no operation shows where the device is the CPU."""

    NAMES = ("tolist", "cpu", "numpy")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def _waits(function):
    """Names of what waits in a call."""
    with _Transfers() as transfers, _Waits() as waits:
        function()
    return waits.found + transfers.found


def test_what_waits_is_seen():
    x = torch.arange(3.0)
    for waits, name in (
        (lambda: bool(x.any()), "_local_scalar_dense"),
        (lambda: int(x[1]), "_local_scalar_dense"),
        (lambda: x[x > 1], "index"),
        (lambda: x.clone().__setitem__(x > 1, x[:1]), "index_put_"),
        (lambda: x.nonzero(), "nonzero"),
        (lambda: x.tolist(), "tolist"),
        (lambda: x.cpu(), "cpu"),
    ):
        assert _waits(waits) == [name]
    assert _waits(lambda: (x + 1)[torch.tensor([0, 1])].double().sum()) == []


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("second_pass", [False, True])
def test_an_update_waits_once_a_layer(variant, second_pass):
    generator = torch.Generator().manual_seed(0)
    metric = ModalityIntegrationRate(2, 24, variant)
    batches = [torch.randn(2000, 24, generator=generator) * (1 + i % 2) + 1 for i in range(40)]
    for batch in batches:
        batch[torch.randperm(2000, generator=generator)[:20]] *= 100
    for part in range(1 + second_pass):
        if part:
            metric.start_second_pass()
        for batch in batches:
            assert _waits(lambda batch=batch: metric.update(batch, batch * 2, layer=0)) == ["tolist"]
            assert _waits(lambda batch=batch: metric.update(batch, batch[:9], layer=1)) == ["tolist"]
    if variant == "paper":
        assert metric.vision_0_moments
        assert second_pass != bool(metric.vision_0_rows)
    every = torch.cat(batches).double().numpy()
    expected = oracle.mir_layers([every], [2 * every], variant)
    assert metric.compute_layers()[0].item() == pytest.approx(expected.item(), rel=1e-8)


def test_where_room_is_short_an_update_waits_twice_more_a_modality():
    """Half of the tokens are massive, more than there is room for."""
    generator = torch.Generator().manual_seed(0)
    metric, batches, found = ModalityIntegrationRate(1, 24), [], []
    for _ in range(60):
        tokens = torch.randn(4000, 24, generator=generator)
        tokens[::2] *= 50 + 50 * torch.rand(2000, 1, generator=generator)
        batches.append(tokens)
        found.append(len(_waits(lambda tokens=tokens: metric.update(tokens, tokens[:9], layer=0))))
    assert set(found) == {1, 2, 3}
    expected = oracle.mir(
        [torch.cat(batches).double().numpy()], [torch.cat([tokens[:9] for tokens in batches]).double().numpy()]
    )
    assert metric.compute().item() == pytest.approx(expected, rel=1e-8)


def test_a_batch_of_a_probe_waits_once_a_layer_and_for_its_masks():
    """Besides what the model itself waits for."""
    network = Network(tiny_llava())
    batch = tiny_batch()
    (masks,), metric = network.masks(Probe([batch]), "after_vision"), None

    def take(vision, text, layer, layers):
        nonlocal metric
        metric = metric or ModalityIntegrationRate(layers, vision.shape[1])
        metric.update(vision, text, layer=layer)

    with torch.no_grad():
        bare = _waits(lambda: network.run(network.inputs(batch)))
        found = _waits(lambda: network.run_tokens(batch, masks, True, take))
    assert sorted(found) == sorted([*bare, "nonzero", "nonzero", *["tolist"] * metric.num_layers])
