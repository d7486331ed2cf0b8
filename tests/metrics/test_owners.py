"""Layers of a metric on several ranks: each finalised once, by its owner, to the same last bit."""

from functools import reduce

import pytest
import torch

from mir_lightning.functional import modality_integration_rate
from mir_lightning.metrics import ModalityIntegrationRate
from mir_lightning.metrics.moments import Moments, moments_of, no_moments, reduce_moments
from tests.distributed import run_on_ranks
from tests.streams import hostile_layers

LAYERS, WIDTH = 5, 24


def _share(rank, world):
    """Of tokens 1,000 away from zero; the last of four ranks has none."""
    tokens = torch.randn(700, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1000
    cuts = {2: [0, 500, 700], 4: [0, 400, 401, 700, 700]}[world]
    return (
        moments_of(part)
        if len(part := tokens[cuts[rank] : cuts[rank + 1]])
        else no_moments(200, torch.float64, "cpu")
    )


def _reduced(rank, world):
    found = [reduce_moments(_share(rank, world), None, owner) for owner in (None, *range(world))]
    return [moments and tuple(moments) for moments in found]


@pytest.mark.parametrize("world", [2, 4])
def test_moments_add_up_in_the_order_of_the_ranks_whoever_gets_them(world):
    """Bit for bit what one process computes of the ranks' moments, one after the other."""
    shares = [_share(rank, world) for rank in range(world)]
    total = sum(share.total for share in shares)
    mean = reduce(torch.add, (share.total * share.mean for share in shares)) / total
    second = torch.zeros_like(shares[0].second)
    for share in shares:
        alone = Moments(torch.cat([mean.new_zeros(1), mean]), share.second.clone())
        away = (share.mean - mean) * share.total.sqrt()
        rows = torch.outer(away, away)
        start = 0
        for top in range(0, 200, 192):
            bottom = min(top + 192, 200)
            block = alone.second[start : start + (bottom - top) * bottom].view(-1, bottom)
            block += rows[top:bottom, :bottom]
            start += block.numel()
        second += alone.second
    for rank, (everywhere, *owned) in enumerate(run_on_ranks(_reduced, world)):
        assert [moments is not None for moments in owned] == [owner == rank for owner in range(world)]
        for head, found in (everywhere, owned[rank]):
            assert torch.equal(head, torch.cat([total[None], mean]))
            assert torch.equal(found, second)


def _metric(rank, world):
    vision, text = hostile_layers("massive", torch.float64, layers=LAYERS, n_vision=900)
    metric = ModalityIntegrationRate(LAYERS, WIDTH)
    for layer in range(LAYERS):
        metric.update(vision[layer].tensor_split(world)[rank], text[layer].tensor_split(world)[rank], layer=layer)
    return metric


def _finalised(rank, world):
    metric, own = _metric(rank, world), []
    plain = metric._layer_distance
    metric._layer_distance = lambda layer: own.append(layer) or plain(layer)
    rows = [torch.cat([value.flatten() for value in layer]) for layer in metric.compute_breakdown()]
    with metric.sync_context():
        held = [bool(getattr(metric, f"vision_{layer}_moments")) for layer in range(LAYERS)]
    metric._everywhere = True
    metric._computed = None
    everywhere = [torch.cat([value.flatten() for value in layer]) for layer in metric.compute_breakdown()]
    return metric.compute().item(), own[: -LAYERS or None], held, torch.stack(rows), torch.stack(everywhere)


@pytest.mark.parametrize("world", [2, 4])
def test_each_layer_is_finalised_by_its_owner_and_known_to_all(world):
    expected = modality_integration_rate(*hostile_layers("massive", torch.float64, layers=LAYERS, n_vision=900))
    first = None
    for rank, (mir, own, held, rows, everywhere) in enumerate(run_on_ranks(_finalised, world)):
        first = rows if first is None else first
        mine = [layer for layer in range(LAYERS) if layer % world == rank]
        assert own == mine
        assert [layer for layer in range(LAYERS) if held[layer]] == mine
        assert torch.equal(rows, first)
        assert torch.equal(rows, everywhere.double())
        assert mir == pytest.approx(expected.item(), rel=1e-8)


def _failing(rank, world, kind):
    metric = _metric(rank, world)
    if kind == "one token":
        metric.reset()
        metric.update([torch.randn(1 + rank, WIDTH)] * LAYERS, [torch.randn(rank, WIDTH)] * LAYERS)
    elif rank == 1:
        plain = metric._layer_distance
        metric._layer_distance = lambda layer: 1 / 0 if layer == 3 else plain(layer)
    try:
        metric.compute()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_an_error_on_one_rank_is_an_error_on_all():
    counts = run_on_ranks(_failing, 2, "one token")
    assert counts[0] == counts[1]
    assert counts[0].startswith("ValueError: text has 1 token(s) in layer 0")
    others, own = run_on_ranks(_failing, 2, "arithmetic")
    assert own == "ZeroDivisionError: division by zero"
    assert others == "RuntimeError: layer 3 failed on rank 1, which finalises it: see there."
