"""Layers of a metric on several ranks: each finalised by one of them, and known to all."""

import pytest
import torch
import torch.distributed as dist

from mir_lightning.functional import modality_integration_rate
from mir_lightning.metrics import ModalityIntegrationRate
from tests.distributed import run_on_ranks
from tests.streams import hostile_layers

LAYERS, WIDTH = 5, 24


def _metric(rank, world, variant="paper", **options):
    """The last of four ranks has no tokens."""
    vision, text = hostile_layers("massive", torch.float64, layers=LAYERS, n_vision=900)
    metric, parts = ModalityIntegrationRate(LAYERS, WIDTH, variant, **options), min(world, 3)
    for layer in range(LAYERS if rank < parts else 0):
        metric.update(vision[layer].tensor_split(parts)[rank], text[layer].tensor_split(parts)[rank], layer=layer)
    return metric


def _rows(metric):
    return torch.stack([torch.cat([v.double().flatten() for v in layer]) for layer in metric.compute_breakdown()])


def _found(rank, world):
    own, rows = [], {}
    for variant in ("paper", "official"):
        metric = _metric(rank, world, variant)
        plain = metric._layer_distance
        metric._layer_distance = lambda layer, plain=plain: own.append(layer) or plain(layer)
        rows[variant] = _rows(metric)
    alone = dist.new_group([0])  # every rank has to make it
    metric = _metric(rank, world, sync_on_compute=False)
    if rank == 0:
        metric.sync(process_group=alone)
        rows["alone"] = _rows(metric)
    failing = _metric(rank, world)
    plain = failing._layer_distance
    failing._layer_distance = lambda layer: 1 / 0 if layer == 3 and rank == 3 % world else plain(layer)
    try:
        rows["failing"] = _rows(failing)
    except (ZeroDivisionError, RuntimeError) as error:
        rows["failing"] = str(error)
    few = ModalityIntegrationRate(LAYERS, WIDTH)
    few.update([torch.randn(1 + rank, WIDTH)] * LAYERS, [torch.randn(int(rank == 1), WIDTH)] * LAYERS)
    try:
        few.compute()
    except ValueError as error:
        rows["few"] = str(error)
    summed = _metric(rank, world)
    rows["moments"] = []
    for whole in (False, True):  # the influences of tokens need the moments of all layers
        summed._layers_have_owners = not whole
        with summed.sync_context():
            rows["moments"].append([k for k in range(LAYERS) if len(getattr(summed, f"vision_{k}_moments")[1])])
    return own, rows


@pytest.mark.parametrize("world", [2, 4])
def test_each_layer_is_finalised_once_and_known_to_all(world):
    tokens = hostile_layers("massive", torch.float64, layers=LAYERS, n_vision=900)
    first = None
    for rank, (own, rows) in enumerate(run_on_ranks(_found, world)):
        first = rows if first is None else first
        assert own == 2 * list(range(rank, LAYERS, world))
        for variant in ("paper", "official"):
            assert torch.equal(rows[variant], first[variant])
            mir = rows[variant][:, :2].sum().log10().item()  # mean gap and covariance gap
            assert mir == pytest.approx(modality_integration_rate(*tokens, variant).item(), rel=1e-8)
        owner = 3 % world
        elsewhere = f"layer 3 could not be finalised by rank {owner}: see its error."
        assert rows["failing"] == ("division by zero" if rank == owner else elsewhere)
        assert rows["moments"] == [[k for k in range(LAYERS) if k % world == rank], [*range(LAYERS)]]
        assert rows["few"].startswith("text has 1 token(s) in layer 0")
    part = [[layer.tensor_split(min(world, 3))[0] for layer in side] for side in tokens]
    alone = first["alone"][:, :2].sum().log10().item()
    assert alone == pytest.approx(modality_integration_rate(*part).item(), rel=1e-8)
