"""Official variants keep every token, and gather them over ranks: as they came, not in float64."""

import pytest
import torch
from torchmetrics.utilities.distributed import gather_all_tensors

from mir_lightning.functional import modality_integration_rate
from mir_lightning.metrics import ModalityIntegrationRate
from tests import oracle
from tests.distributed import run_on_ranks
from tests.streams import hostile_layers

LAYERS, WIDTH = 2, 24
TOKENS = hostile_layers("massive", torch.bfloat16, n_vision=90, n_text=60)
OF_RANK_0 = {"even": (45, 30), "uneven": (80, 60), "all": (90, 60)}  # vision and text tokens


def _states(metric):
    rows = [r for layer in range(LAYERS) for m in ("vision", "text") for r in getattr(metric, f"{m}_{layer}_rows")]
    return {r.dtype for r in rows}, sum(r.nbytes for r in rows)


def _found(rank, world, split, dtypes):
    """MIR; dtypes and bytes of the states of this rank, and of all while synced; bytes it gave to gathers."""
    given = []

    def gather(tensor, group=None):
        given.append(tensor.nbytes)
        return gather_all_tensors(tensor, group)

    metric = ModalityIntegrationRate(LAYERS, WIDTH, "official", dist_sync_fn=gather)
    for layer, of_layer in enumerate(zip(*TOKENS, strict=True)):
        parts = [m.tensor_split([cut])[rank] for m, cut in zip(of_layer, OF_RANK_0[split], strict=True)]
        for chunk in zip(*(part.to(dtypes[rank]).tensor_split(3) for part in parts), strict=True):
            metric.update(*chunk, layer=layer)
    own = _states(metric)
    value, sent = metric.compute().item(), sum(given)
    with metric.sync_context(dist_sync_fn=gather):
        synced = _states(metric)
    return value, own, synced, sent


@pytest.mark.parametrize(("world", "split"), [(1, "all"), (2, "even"), (2, "uneven"), (2, "all")])
def test_bfloat16_tokens_stay_bfloat16(world, split):
    expected = oracle.mir(*([layer.double().numpy() for layer in m] for m in TOKENS), "official")
    every = LAYERS * (90 + 60) * WIDTH * 2
    for rank, (value, own, synced, sent) in enumerate(
        run_on_ranks(_found, world, split, [torch.bfloat16] * world)
    ):
        assert value == pytest.approx(expected, rel=1e-12)
        vision, text = OF_RANK_0[split]
        tokens = (90 - vision) + (60 - text) if rank else vision + text
        assert own == ({torch.bfloat16} if tokens else set(), LAYERS * tokens * WIDTH * 2)
        assert synced == ({torch.bfloat16}, every)
        assert sent == LAYERS * tokens * WIDTH * 2 + 2 * LAYERS * 8 or world == 1


def test_ranks_whose_tokens_came_in_two_dtypes_meet_in_the_narrowest_that_holds_both():
    vision, text = ([layer.double() for layer in m] for m in TOKENS)
    expected = modality_integration_rate(
        *([torch.cat([x[:n], x[n:].half().double()]) for x in m] for m, n in ((vision, 45), (text, 30))),
        "official",
    )
    for value, _, synced, _ in run_on_ranks(_found, 2, "even", [torch.bfloat16, torch.float16]):
        assert value == pytest.approx(expected.item(), rel=1e-12)
        assert synced[0] == {torch.float32}
