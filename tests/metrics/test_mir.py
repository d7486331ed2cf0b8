import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection
from torchmetrics.wrappers import Running

from mir_lightning.functional import modality_integration_rate
from mir_lightning.metrics import ModalityIntegrationRate
from mir_lightning.metrics.mir import AccumulatedOutlierError
from tests import oracle
from tests.distributed import run_on_ranks
from tests.streams import KINDS, hostile_layers, make_massive

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


@pytest.mark.parametrize("variant", ["paper", "robust", "official"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [1, 7, 100])
def test_any_split_equals_the_oracle(kind, dtype, variant, splits, device):
    vision, text = hostile_layers(kind, dtype, device=device)
    expected, robust = (
        oracle.mir(*([x.double().cpu().numpy() for x in m] for m in (vision, text)), rule)
        for rule in (variant, "robust")
    )
    metric = _stream(ModalityIntegrationRate(LAYERS, WIDTH, variant), vision, text, splits)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-8)
    assert metric.compute_robust().item() == pytest.approx(robust, rel=1e-8)
    assert metric.compute().item() == pytest.approx(metric.compute_layers().sum().log10().item())


def test_official_fast_streams_to_the_functional():
    vision, text = hostile_layers("massive")
    metric = _stream(ModalityIntegrationRate(LAYERS, WIDTH, "official-fast"), vision, text, 9)
    expected = modality_integration_rate(vision, text, "official-fast").item()
    assert metric.compute().item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("accumulator", [torch.float64, torch.float32])
@pytest.mark.parametrize("share", [0, 1e-9, 0.001, 0.05, 0.2])
@pytest.mark.parametrize("place", ["start", "end", "middle", "spread"])
def test_massive_activations_anywhere_in_the_stream(share, place, accumulator):
    """In 12 updates, so that a place is a few updates of nothing but massive tokens."""
    vision, text = hostile_layers("plain", n_vision=12_000, n_text=15_000, d=32)
    for tokens in (*vision, *text):
        make_massive(tokens, share, place)
    expected = oracle.mir(*([x.double().numpy() for x in m] for m in (vision, text)))
    metric = ModalityIntegrationRate(LAYERS, 32, accumulator=accumulator)
    _stream(metric, vision, text, 12)
    assert metric.vision_0_moments
    assert metric.text_0_moments
    try:
        value = metric.compute()
    except AccumulatedOutlierError:
        assert place == "start"  # they were usual at first: noticed, and repaired
        metric.start_second_pass()
        value = _stream(metric, vision, text, 12).compute()
    tolerance = 1e-8 if accumulator == torch.float64 else 1e-6
    assert value.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    robust = oracle.mir(*([x.double().numpy() for x in m] for m in (vision, text)), "robust")
    assert metric.compute_robust().item() == pytest.approx(robust, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["accumulator", "products"])
def test_float32_is_exact_to_1e_6(kind, dtype, name):
    vision, text = hostile_layers(kind, dtype, n_vision=50_000, n_text=60_000)
    expected = oracle.mir(*([x.double().numpy() for x in m] for m in (vision, text)))
    metric = ModalityIntegrationRate(LAYERS, WIDTH, **{name: torch.float32})
    _stream(metric, vision, text, 40)
    if kind != "few_tokens":
        assert metric.vision_0_moments[1].dtype == metric.accumulator
    try:
        metric.compute()
    except AccumulatedOutlierError:
        assert kind in ("half_equal", "duplicated")  # few different norms: medians jump along the stream
        metric.start_second_pass()
        _stream(metric, vision, text, 40)
    tolerance = 1e-5 if kind == "duplicated" else 1e-6  # a singular covariance: roots magnify its rounding
    assert metric.compute().item() == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(("precision", "autocast"), [("medium", False), ("high", False), ("highest", True)])
def test_reduced_precision_switched_on_by_the_user_changes_nothing(precision, autocast, device):
    vision, text = hostile_layers("massive", n_vision=9000, n_text=9000, d=64, device=device)
    for options in ({}, {"accumulator": torch.float32}, {"products": torch.float32}):
        metric = ModalityIntegrationRate(LAYERS, 64, **options)
        expected = _stream(metric, vision, text, 9).compute().item()
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                metric.reset()
                assert _stream(metric, vision, text, 9).compute().item() == pytest.approx(expected, rel=1e-12)
                official = modality_integration_rate(vision, text, "official-fast").item()
            assert torch.get_float32_matmul_precision() == precision
        finally:
            torch.set_float32_matmul_precision(before)
        assert official == modality_integration_rate(vision, text, "official-fast").item()


@pytest.mark.parametrize(("n_vision", "n_text"), [(40_000, 300), (2, 3)])
def test_width_one(n_vision, n_text):
    vision, text = hostile_layers("massive", n_vision=n_vision, n_text=n_text, d=1)
    expected = oracle.mir(*([x.double().numpy() for x in m] for m in (vision, text)))
    metric = ModalityIntegrationRate(LAYERS, 1)
    assert _stream(metric, vision, text, 2).compute().item() == pytest.approx(expected, rel=1e-8)


def test_width_4096_with_fewer_tokens_than_dimensions_keeps_tokens_not_matrices():
    vision, text = ([torch.randn(n, 4096) * torch.logspace(1, -3, 4096) + o] for n, o in ((300, 0.1), (200, 0)))
    make_massive(vision[0], 0.01, "start")
    expected = oracle.mir(*([x.double().numpy() for x in m] for m in (vision, text)))
    metric = ModalityIntegrationRate(1, 4096)
    assert _stream(metric, vision, text, 5).compute().item() == pytest.approx(expected, rel=1e-8)
    assert sum(tensor.nbytes for name in metric._defaults for tensor in getattr(metric, name)) == 500 * 4096 * 4


@pytest.mark.slow
def test_width_4096_with_more_tokens_than_dimensions():
    vision, text = (
        [torch.randn(n, 4096).bfloat16() * torch.logspace(1, -2, 4096) + o] for n, o in ((9000, 0.1), (8500, 0))
    )
    make_massive(vision[0], 0.001, "start")
    expected = oracle.mir(*([x.double().numpy() for x in m] for m in (vision, text)))
    metric = ModalityIntegrationRate(1, 4096)
    value = _stream(metric, vision, text, 5).compute().item()
    assert metric.vision_0_moments
    assert value == pytest.approx(expected, rel=1e-8)


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


@pytest.mark.parametrize("share", [0.2, 0.49])
@pytest.mark.parametrize("second_pass", [False, True])
def test_more_massive_tokens_than_there_is_room_for_have_moments_of_their_own(share, second_pass):
    vision, text = hostile_layers("plain", torch.float64, n_vision=200_000, n_text=30_000, layers=1)
    generator = torch.Generator().manual_seed(1)
    massive = torch.rand(200_000, generator=generator) < share
    vision[0][massive] *= 50 + 50 * torch.rand(int(massive.sum()), 1, generator=generator)
    metric = _stream(ModalityIntegrationRate(1, WIDTH, "robust"), vision, text, 40)
    if second_pass:
        metric.start_second_pass()
        _stream(metric, vision, text, 40)
    own, _, massive_ones, *_ = metric.vision_0_moments  # heads: the count comes first
    assert massive_ones[0] > 0.6 * massive.sum()
    assert own[0] > 0.9 * (~massive).sum()
    assert sum(r.nbytes for r in metric.vision_0_rows) <= (0 if second_pass else 2**21)
    expected = oracle.mir_layers([vision[0].numpy()], [text[0].numpy()], "robust")
    assert metric.compute_layers().item() == pytest.approx(expected.item(), rel=1e-8)
    paper = ModalityIntegrationRate(1, WIDTH)
    paper.merge_state(metric)
    expected = oracle.mir([vision[0].numpy()], [text[0].numpy()])
    assert paper.compute().item() == pytest.approx(expected, rel=1e-8)
    (layer,) = paper.compute_breakdown()
    outside = [oracle.outliers(x.numpy(), "robust").sum() for x in (vision[0], text[0])]
    assert layer.massive.tolist() == outside
    assert outside[0] >= massive.sum()


def test_memory_is_moments_and_norms():
    d = 512
    metric = ModalityIntegrationRate(1, d)
    for seed in range(50):
        (vision,), (text,) = hostile_layers("massive", layers=1, d=d, seed=seed)
        metric.update(vision, text, layer=0)
    for group, tokens in (("vision_0", 35_000), ("text_0", 25_000)):
        assert sum(m.nbytes for m in getattr(metric, f"{group}_moments")) <= 8 * (d * d / 2 + 192 * d / 2 + d + 1)
        assert sum(n.nbytes for n in getattr(metric, f"{group}_norms")) <= 8 * tokens
        assert sum(r.nbytes for r in getattr(metric, f"{group}_rows")) < 0.04 * tokens * d * 4


@settings(max_examples=40, deadline=None)
@given(
    splits=st.integers(1, 60),
    order=st.integers(1, 1000),
    kind=st.sampled_from(["plain", "massive", "masked", "half_massive", "huge_mean", "duplicated"]),
    ranks=st.integers(1, 5),
    n_vision=st.sampled_from([13, 700, 20_000]),
)
def test_any_order_split_and_merge_gives_the_same_number(splits, order, kind, ranks, n_vision):
    vision, text = hostile_layers(kind, n_vision=n_vision)
    expected, robust = (modality_integration_rate(vision, text, v).item() for v in ("paper", "robust"))
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
    assert merged.compute_robust().item() == pytest.approx(robust, rel=1e-8)


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


def test_running_window_is_the_last_updates():
    batches = [hostile_layers("massive", seed=seed, n_vision=20_000 // (seed + 1)) for seed in range(5)]
    running = Running(ModalityIntegrationRate(LAYERS, WIDTH), window=2)
    for seed, (vision, text) in enumerate(batches):
        assert running(vision, text).item() == pytest.approx(
            modality_integration_rate(vision, text).item(), rel=1e-8
        )
        window = batches[max(0, seed - 1) : seed + 1]
        expected = modality_integration_rate(
            *([torch.cat(layer) for layer in zip(*m, strict=True)] for m in zip(*window, strict=True))
        )
        assert running.compute().item() == pytest.approx(expected.item(), rel=1e-8)


def test_variants_in_one_collection_share_no_states_that_differ():
    variants = ("paper", "robust", "official", "official-fast")
    together = MetricCollection({v: ModalityIntegrationRate(LAYERS, WIDTH, v) for v in variants})
    alone = {v: ModalityIntegrationRate(LAYERS, WIDTH, v) for v in variants}
    for seed in range(8):
        vision, text = hostile_layers("massive", n_vision=3000, seed=seed)
        for metric in (together, *alone.values()):
            metric.update(vision, text)
    for variant, value in together.compute().items():
        assert value.item() == pytest.approx(alone[variant].compute().item(), rel=1e-9), variant


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_updates_in_and_out_of_inference_mode(variant):
    vision, text = hostile_layers("massive", n_vision=9000)
    metric = ModalityIntegrationRate(LAYERS, WIDTH, variant)
    chunks = [[x.tensor_split(6) for x in m] for m in (vision, text)]
    for place in range(6):
        with torch.inference_mode(place % 2 == 0):
            metric.update(*([layer[place].clone() for layer in m] for m in chunks))
    expected = modality_integration_rate(vision, text, variant).item()
    assert metric.compute().item() == pytest.approx(expected, rel=1e-8)


def test_merge_state_leaves_the_other_metric_alone():
    vision, text = hostile_layers("plain", n_vision=20_000, n_text=20_000)
    other = _stream(ModalityIntegrationRate(LAYERS, WIDTH), vision, text, 3)
    expected = other.compute().item()
    metric = ModalityIntegrationRate(LAYERS, WIDTH)
    metric.merge_state(other)
    _stream(metric, vision, text, 3)
    other._computed = None
    assert other.compute().item() == expected
    assert metric.compute().item() != expected


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.set_dtype(torch.float32)]
)
def test_states_keep_their_precision(cast):
    vision, text = hostile_layers("massive", n_vision=20_000)
    metric = _stream(ModalityIntegrationRate(LAYERS, WIDTH), vision, text, 9)
    expected = metric.compute().item()
    metric = cast(metric)
    metric._computed = None
    assert metric.compute().item() == expected


def test_compute_on_cpu_and_a_change_of_device(device):
    vision, text = hostile_layers("massive", n_vision=20_000)
    metric = ModalityIntegrationRate(LAYERS, WIDTH, compute_on_cpu=True)
    _stream(metric, [v.to(device) for v in vision], [t.to(device) for t in text], 9)
    assert {t.device.type for name in metric._defaults for t in getattr(metric, name)} == {"cpu"}
    assert metric.compute().item() == pytest.approx(modality_integration_rate(vision, text).item(), rel=1e-8)


def test_another_device_than_before():
    metric = ModalityIntegrationRate(1, WIDTH)
    metric.update(torch.randn(3, WIDTH), torch.randn(3, WIDTH), layer=0)
    metric.vision_0_rows[0] = metric.vision_0_rows[0].to("meta")
    with pytest.raises(ValueError, match="tokens of layer 0 were on meta before and are on cpu now"):
        metric.update(torch.randn(3, WIDTH), torch.randn(3, WIDTH), layer=0)


def test_a_refused_update_adds_nothing():
    vision, text = hostile_layers("plain")
    metric = _stream(ModalityIntegrationRate(LAYERS, WIDTH), vision, text, 2)
    expected = metric.compute().item()
    with pytest.raises(ValueError, match="text hidden states of layer 1 hold NaN"):
        metric.update(vision[1], torch.full((3, WIDTH), torch.nan), layer=1)
    assert metric.compute().item() == expected


def test_breakdown_adds_up_and_counts():
    vision, text = hostile_layers("massive", torch.float64)
    orders = [
        _stream(ModalityIntegrationRate(LAYERS, WIDTH, rank_order=order), vision, text, 7).compute_breakdown()
        for order in (2, 1)
    ]
    for layer, by_entropy, v, t in zip(*orders, vision, text, strict=True):
        alpha = 1 / t.norm(dim=1).mean()
        for index, tokens in enumerate((v, t)):
            bad = oracle.outliers(tokens.numpy())
            clean = alpha * tokens[torch.from_numpy(~bad)]
            eigenvalues = np.linalg.eigvalsh(oracle.covariance(clean.numpy()))
            shares = eigenvalues / eigenvalues.sum()
            assert layer.outliers[index] == bad.sum() > 0
            assert layer.tokens[index] == len(tokens)
            assert layer.total_variance[index].item() == pytest.approx(eigenvalues.sum(), rel=1e-10)
            entropy = np.exp(-(shares * np.log(shares)).sum())
            assert by_entropy.effective_rank[index].item() == pytest.approx(entropy, rel=1e-9)
            assert layer.effective_rank[index].item() == pytest.approx(1 / (shares**2).sum(), rel=1e-9)
        means = [m[torch.from_numpy(~oracle.outliers(m.numpy()))].mean(0) for m in (v, t)]
        assert layer.mean_gap.item() == pytest.approx(
            (alpha * (means[0] - means[1])).square().sum().item(), rel=1e-10
        )
        assert layer.scale.item() == pytest.approx(alpha.item(), rel=1e-12)
        assert layer.norm_ratio.item() == pytest.approx((v.norm(dim=1).mean() * alpha).item(), rel=1e-12)
        clean = [x[torch.from_numpy(~oracle.outliers(x.numpy()))] / x.norm(dim=1).mean() for x in (v, t)]
        alike = oracle.token_frechet_distance(*(x.numpy() for x in clean))
        assert layer.equal_norm.item() == pytest.approx(alike, rel=1e-8)


def test_a_collapsed_projector_has_a_low_mir_and_a_low_rank():
    """Nearly constant vision tokens amid the text are close to it; only their rank tells."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -3, 64)  # as of real hidden states: a few directions carry the variance
    text = torch.randn(4000, 64, generator=generator) * spectrum + 0.2
    healthy = torch.randn(4000, 64, generator=generator) * spectrum.flip(0) + 0.2
    collapsed = text.mean(0) + 0.3 * torch.randn(4000, 1, generator=generator) * torch.eye(64)[0]
    found = {}
    for name, vision in (("healthy", healthy), ("collapsed", collapsed)):
        metric = ModalityIntegrationRate(1, 64)
        metric.update(vision, text, layer=0)
        found[name] = metric.compute().item(), metric.compute_breakdown()[0].effective_rank
    assert found["collapsed"][0] < found["healthy"][0] - 0.3
    assert found["collapsed"][1][0] < 1.5 < 8 < found["healthy"][1][0]


def test_plot_draws_layers_and_values_over_time():
    from matplotlib.figure import Figure

    metric = _stream(ModalityIntegrationRate(LAYERS, WIDTH), *hostile_layers("plain"), 2)
    _, axes = metric.plot()
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    np.testing.assert_allclose(lines["Fréchet distance"], metric.compute_layers())
    np.testing.assert_allclose(lines["mean gap"] + lines["covariance gap"], lines["Fréchet distance"])
    assert axes.get_xlabel() == "decoder layer"
    axes = Figure().subplots()
    assert metric.plot(ax=axes) == (None, axes)
    _, axes = metric.plot([torch.tensor(2.0), torch.tensor(1.5), torch.tensor(1.0)])
    assert any(list(line.get_ydata()) == [2.0, 1.5, 1.0] for line in axes.get_lines())


def test_many_massive_tokens_need_no_second_pass():
    """A third of the tokens up to 20 times as loud, as in a young projector: what is not sure has room enough."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        norms = 100 * (1 + 0.12 * torch.randn(9000, generator=generator, dtype=torch.float64)).abs()
        massive = torch.randperm(9000, generator=generator)[:2700]
        norms[massive] *= torch.exp(3 * torch.rand(2700, generator=generator, dtype=torch.float64))
        metric = ModalityIntegrationRate(1, 576, accumulator=torch.float32)
        for part in norms.split(150):
            tokens = torch.zeros(len(part), 576)
            tokens[:, 0] = part
            metric.update(tokens, tokens[:0], layer=0)
        metric._clouds(0)[0].judged("vision", 0)  # raises if a token was accumulated as another one than it is


def _massive_on_ranks(rank, world):
    """Each rank holds its massive tokens back, or has accumulated them apart; rank 1 has none."""
    values = []
    for n_vision in (900, 40_000):
        vision, text = hostile_layers("masked", torch.float64, n_vision=n_vision)
        massive = [oracle.outliers(v.numpy(), "robust") for v in vision]
        order = [np.argsort(m, kind="stable") for m in massive]
        shares = [[v[o].tensor_split(world)[world - 1 - rank] for v, o in zip(vision, order, strict=True)]]
        shares.append([t.tensor_split(world)[rank] for t in text])
        metric = ModalityIntegrationRate(LAYERS, WIDTH)
        _stream(metric, *shares, 20, order=rank + 1)
        try:
            metric.compute()
        except AccumulatedOutlierError:
            metric.start_second_pass()
            _stream(metric, *shares, 20, order=rank + 1)
        values += [metric.compute().item(), metric.compute_robust().item()]
    return values


def test_ranks_with_different_shares_of_massive_tokens():
    expected = []
    for n_vision in (900, 40_000):
        vision, text = ([x.numpy() for x in m] for m in hostile_layers("masked", torch.float64, n_vision=n_vision))
        expected += [oracle.mir(vision, text), oracle.mir(vision, text, "robust")]
    for values in run_on_ranks(_massive_on_ranks, 2):
        np.testing.assert_allclose(values, expected, rtol=1e-8)


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
    before = sum(map(len, metric.vision_0_rows))
    values = metric.compute().item(), official.compute().item(), metric.compute_layers().sum().log10().item()
    assert sum(map(len, metric.vision_0_rows)) == before, "the local stream must go on"
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
        ((torch.randn(3, 5), torch.randn(3, 5), 0), ValueError, "layer 0 must have width hidden_size=24, got 5"),
        ((torch.randn(3, 5), torch.randn(3, WIDTH), 1), ValueError, "layer 1 must have one width, got 5 and 24"),
        (
            (torch.randn(3, WIDTH), torch.empty(3, WIDTH, device="meta"), 1),
            ValueError,
            "vision and text tokens of layer 1 must be on one device, got cpu and meta",
        ),
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
    ("arguments", "message"),
    [
        ((0, 3), "num_layers"),
        ((3, 0), "hidden_size"),
        ((1, 1, "x"), "variant"),
        ((1, 1, "paper", torch.float16), "accumulator must be torch.float64 or torch.float32, got torch.float16"),
        ((1, 1, "paper", torch.float32, 2, torch.bfloat16), "products must be torch.float64 or torch.float32"),
    ],
)
def test_bad_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModalityIntegrationRate(*arguments)


def test_an_update_that_fails_has_added_nothing():
    vision, text = hostile_layers("plain", layers=2)
    metric, same = ModalityIntegrationRate(2, WIDTH), ModalityIntegrationRate(2, WIDTH)
    metric.update(vision, text)
    same.update(vision, text)
    with pytest.raises(ValueError, match="layer 1 hold NaN"):
        metric.update(vision, [text[0], text[1] * torch.nan])
    assert metric.compute() == same.compute()


def test_metrics_that_differ_do_not_merge():
    vision, text = hostile_layers("plain", layers=2)
    metric, other = ModalityIntegrationRate(2, WIDTH), ModalityIntegrationRate(1, WIDTH)
    metric.update(vision, text)
    other.update(vision[:1], text[:1])
    with pytest.raises(ValueError, match=r"2 layers of width .* and 1 layers"):
        metric.merge_state(other)
    with pytest.raises(ValueError, match=r"torch.float64 of .*, and .*, torch.float32 of"):
        metric.merge_state(ModalityIntegrationRate(2, WIDTH, accumulator=torch.float32))
    with pytest.raises(ValueError, match=r"float64 of .*float64 products, and .*float64 of .*float32 products"):
        metric.merge_state(ModalityIntegrationRate(2, WIDTH, products=torch.float32))
