import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mir_lightning.functional import modality_integration_rate
from mir_lightning.metrics import ModalityIntegrationRate
from mir_lightning.metrics.mir import AccumulatedOutlierError
from tests import oracle
from tests.distributed import run_on_ranks
from tests.streams import hostile_layers

LAYERS, WIDTH = 2, 24


def _stream(metric, vision, text, splits, order=None):
    """Feed every layer in ``splits`` updates, in a permuted order of tokens if one is given."""
    generator = torch.Generator().manual_seed(order or 0)
    for layer, (v, t) in enumerate(zip(vision, text, strict=True)):
        if order is not None:
            v, t = (x[torch.randperm(len(x), generator=generator)] for x in (v, t))
        for chunk in zip(v.tensor_split(splits), t.tensor_split(splits), strict=True):
            metric.update(*chunk, layer=layer)
    return metric


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "massive", "huge_mean", "few_tokens", "constant", "duplicated"])
@pytest.mark.parametrize("splits", [1, 7, 100])
def test_any_split_equals_the_oracle(kind, dtype, variant, splits):
    vision, text = hostile_layers(kind, dtype)
    expected = oracle.mir(*([x.double().numpy() for x in m] for m in (vision, text)), variant)
    metric = _stream(ModalityIntegrationRate(LAYERS, WIDTH, variant), vision, text, splits)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-8)
    assert metric.compute().item() == pytest.approx(metric.compute_layers().sum().log10().item())


def test_official_fast_streams_to_the_functional():
    vision, text = hostile_layers("massive")
    metric = _stream(ModalityIntegrationRate(LAYERS, WIDTH, "official-fast"), vision, text, 9)
    expected = modality_integration_rate(vision, text, "official-fast").item()
    assert metric.compute().item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("share", [0.002, 0.05, 0.2])
@pytest.mark.parametrize("place", ["start", "end", "spread"])
def test_massive_activations_anywhere_in_the_stream(share, place):
    vision, text = hostile_layers("plain", n_vision=12_000, n_text=15_000, d=32)
    for tokens in (*vision, *text):
        count = max(1, int(share * len(tokens)))
        where = {
            "start": torch.arange(count),
            "end": torch.arange(len(tokens) - count, len(tokens)),
            "spread": torch.arange(0, len(tokens), len(tokens) // count)[:count],
        }[place]
        tokens[where] *= 1000
    expected = oracle.mir(*([x.double().numpy() for x in m] for m in (vision, text)))
    metric = ModalityIntegrationRate(LAYERS, 32)
    _stream(metric, vision, text, 40)
    assert metric._state("vision_0", "moments")
    assert metric._state("text_0", "moments")
    try:
        value = metric.compute()
    except AccumulatedOutlierError:
        assert place == "start"  # they were usual at first: noticed, and repaired
        metric.start_second_pass()
        value = _stream(metric, vision, text, 40).compute()
    assert value.item() == pytest.approx(expected, rel=1e-8)


def test_an_accumulated_outlier_is_noticed_and_a_second_pass_repairs_it():
    """A stream that changes character: what was usual at first is an outlier in the end."""
    generator = torch.Generator().manual_seed(0)
    early = 50 + torch.randn(12_000, WIDTH, generator=generator)
    late = torch.randn(400_000, WIDTH, generator=generator)
    text = torch.randn(300, WIDTH, generator=generator)

    def feed(metric):
        metric.update(early, text, layer=0)
        for chunk in late.split(50_000):
            metric.update(chunk, text[:0], layer=0)

    metric = ModalityIntegrationRate(1, WIDTH)
    feed(metric)
    with pytest.raises(AccumulatedOutlierError, match=r"vision tokens of layer 0 .* start_second_pass\(\)"):
        metric.compute()
    metric.start_second_pass()
    feed(metric)
    expected = oracle.mir([torch.cat([early, late]).double().numpy()], [text.double().numpy()])
    assert metric.compute().item() == pytest.approx(expected, rel=1e-8)
    metric.reset()
    metric.update(late[:4000], text, layer=0)
    assert metric.compute().item() == pytest.approx(
        oracle.mir([late[:4000].double().numpy()], [text.double().numpy()]), rel=1e-8
    )


def test_memory_is_moments_and_norms():
    d = 512
    metric = ModalityIntegrationRate(1, d)
    for seed in range(50):
        (vision,), (text,) = hostile_layers("massive", layers=1, d=d, seed=seed)
        metric.update(vision, text, layer=0)
    for group, tokens in (("vision_0", 35_000), ("text_0", 25_000)):
        assert sum(m.nbytes for m in metric._state(group, "moments")) <= 0.8 * 8 * d * d
        assert sum(n.nbytes for n in metric._state(group, "norms")) <= 8 * tokens
        assert sum(r.nbytes for r in metric._state(group, "rows")) < 0.04 * tokens * d * 4


@settings(max_examples=40, deadline=None)
@given(
    splits=st.integers(1, 60),
    order=st.integers(1, 1000),
    kind=st.sampled_from(["plain", "massive", "huge_mean", "duplicated"]),
    ranks=st.integers(1, 5),
    n_vision=st.sampled_from([13, 700, 20_000]),
)
def test_any_order_split_and_merge_gives_the_same_number(splits, order, kind, ranks, n_vision):
    vision, text = hostile_layers(kind, n_vision=n_vision)
    expected = modality_integration_rate(vision, text).item()
    merged = ModalityIntegrationRate(LAYERS, WIDTH)
    generator = torch.Generator().manual_seed(order)
    shares = [
        [x.tensor_split(ranks) for x in (v[torch.randperm(len(v), generator=generator)], t)]
        for v, t in zip(vision, text, strict=True)
    ]
    for rank in range(ranks):
        part = ModalityIntegrationRate(LAYERS, WIDTH)
        _stream(part, [v[rank] for v, _ in shares], [t[rank] for _, t in shares], splits)
        merged.merge_state(part)
    assert merged.compute().item() == pytest.approx(expected, rel=1e-8)


def test_forward_gives_the_batch_value_and_accumulates():
    vision, text = hostile_layers("massive")
    metric = ModalityIntegrationRate(LAYERS, WIDTH)
    halves = (
        [[x[: len(x) // 2] for x in m] for m in (vision, text)],
        [[x[len(x) // 2 :] for x in m] for m in (vision, text)],
    )
    for half in halves:
        assert metric(*half).item() == pytest.approx(modality_integration_rate(*half).item(), rel=1e-8)
    assert metric.compute().item() == pytest.approx(modality_integration_rate(vision, text).item(), rel=1e-8)


def test_pickle_clone_and_state_dict_resume_in_the_middle_of_a_stream():
    vision, text = hostile_layers("massive", n_vision=900)
    expected = modality_integration_rate(vision, text).item()
    first = [[x[:350] for x in m] for m in (vision, text)]
    rest = [[x[350:] for x in m] for m in (vision, text)]
    metric = _stream(ModalityIntegrationRate(LAYERS, WIDTH), *first, 5)
    metric.persistent(True)
    restored = ModalityIntegrationRate(LAYERS, WIDTH)
    restored.load_state_dict(metric.state_dict())
    for copy in (pickle.loads(pickle.dumps(metric)), metric.clone(), restored):
        assert _stream(copy, *rest, 3).compute().item() == pytest.approx(expected, rel=1e-8)


def _uneven_ranks(rank, world):
    """Rank 1 of 2 gets a third; with 3 or more ranks the last has nothing."""
    vision, text = hostile_layers("massive", n_vision=900)
    cuts = {2: [0, 600, 900], 4: [0, 500, 503, 900, 900]}[world]
    part = [[x[cuts[rank] : cuts[rank + 1]] for x in m] for m in (vision, text)]
    metric = ModalityIntegrationRate(LAYERS, WIDTH)
    if part[0][0].numel():
        _stream(metric, *part, 6)
    official = ModalityIntegrationRate(LAYERS, WIDTH, "official")
    if part[0][0].numel():
        _stream(official, *part, 6)
    before = sum(map(len, metric._state("vision_0", "rows")))
    values = metric.compute().item(), official.compute().item(), metric.compute_layers().sum().log10().item()
    assert sum(map(len, metric._state("vision_0", "rows"))) == before, "the local stream must go on"
    return values


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_different_numbers_of_tokens_agree_with_one_process(world):
    vision, text = hostile_layers("massive", n_vision=900)
    paper = modality_integration_rate(vision, text).item()
    official = modality_integration_rate(vision, text, "official").item()
    for values in run_on_ranks(_uneven_ranks, world):
        np.testing.assert_allclose(values, (paper, official, paper), rtol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.randn(3, WIDTH), torch.randn(3, WIDTH), LAYERS),
            ValueError,
            r"layer must lie in 0 .. 1, got 2",
        ),
        ((torch.randn(3, 5), torch.randn(3, WIDTH), 0), ValueError, "vision .* hidden_size=24, got 5"),
        ((torch.randn(3, WIDTH), torch.ones(3, WIDTH).int(), 0), TypeError, "text tokens .* floating point"),
        (
            (torch.randn(3, WIDTH), torch.full((3, WIDTH), torch.nan), 1),
            ValueError,
            "text hidden states of layer 1",
        ),
        (([torch.randn(3, WIDTH)], [torch.randn(3, WIDTH)]), ValueError, "sequences of 2 tensors"),
    ],
)
def test_bad_updates(arguments, error, message):
    metric = ModalityIntegrationRate(LAYERS, WIDTH)
    with pytest.raises(error, match=message):
        metric.update(*arguments)


def test_one_token_short():
    metric = ModalityIntegrationRate(1, WIDTH)
    metric.update(torch.randn(5, WIDTH), torch.randn(1, WIDTH), layer=0)
    with pytest.raises(ValueError, match=r"text has 1 token\(s\) in layer 0: a covariance needs at least 2"):
        metric.compute()


@pytest.mark.parametrize(
    ("arguments", "message"), [((0, 3), "num_layers"), ((3, 0), "hidden_size"), ((1, 1, "x"), "variant")]
)
def test_bad_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModalityIntegrationRate(*arguments)
