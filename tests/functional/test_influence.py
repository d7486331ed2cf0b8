import numpy as np
import pytest
import torch

from mir_lightning.functional import mir_influence, modality_integration_rate, standard_error
from mir_lightning.functional.influence import LayerInfluence
from tests import oracle
from tests.streams import correlated_samples, hostile_layers, samples_of


def _weighted_mir(vision, text, weights, of_vision, of_text, variant="paper"):
    """MIR with a weight for each sample, the outliers held fixed; in NumPy, from the definition."""
    total = 0.0
    for v, t in zip(vision, text, strict=True):
        moments = []
        alpha = 1 / np.average(np.linalg.norm(t, axis=1), weights=weights[of_text])
        for tokens, samples in ((v, of_vision), (t, of_text)):
            kept = ~oracle.outliers(tokens, variant)
            x, w = alpha * tokens[kept], weights[samples[kept]]
            centred = x - (mean := w @ x / w.sum())
            moments.append((mean, np.sqrt(w / (w.sum() - 1))[:, None] * centred))
        (mean_v, v), (mean_t, t) = moments
        factors = (np.linalg.qr(x, mode="r") for x in (v, t))
        cross = np.linalg.svd(next(factors) @ next(factors).T, compute_uv=False).sum()
        total += ((mean_v - mean_t) ** 2).sum() + (v**2).sum() + (t**2).sum() - 2 * cross
    return np.log10(total)


def _derivatives(vision, text, of_vision, of_text, variant, step=1e-5):
    arrays = [[layer.double().numpy() for layer in side] for side in (vision, text)]
    of_vision, of_text = of_vision.numpy(), of_text.numpy()
    found = []
    for sample in range(of_vision.max() + 1):
        weights = np.ones((2, of_vision.max() + 1))
        weights[:, sample] += (step, -step)
        up, down = (_weighted_mir(*arrays, w, of_vision, of_text, variant) for w in weights)
        found.append((up - down) / (2 * step))
    return np.array(found)


@pytest.mark.parametrize("variant", ["paper", "robust"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["plain", "massive", "masked", "huge_mean", "few_tokens", "constant", "duplicated"]
)
def test_is_the_derivative_by_each_samples_weight(kind, dtype, variant):
    size = {} if kind == "few_tokens" else {"n_vision": 240, "n_text": 160, "d": 12}
    vision, text = hostile_layers(kind, dtype, **size)
    of_vision, of_text = (samples_of(4 if kind == "few_tokens" else 40, len(side[0])) for side in (vision, text))
    found = mir_influence(vision, text, of_vision, of_text, variant).numpy()
    expected = _derivatives(vision, text, of_vision, of_text, variant)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_standard_error_is_the_jackknifes_where_outliers_are_judged_anew():
    vision, text, of_vision, of_text = correlated_samples(0)
    without = torch.stack(
        [
            modality_integration_rate([v[of_vision != i] for v in vision], [t[of_text != i] for t in text])
            for i in range(80)
        ]
    )
    jackknife = (79 / 80 * (without - without.mean()).square().sum()).sqrt()
    error = standard_error(mir_influence(vision, text, of_vision, of_text))
    assert error.item() == pytest.approx(jackknife.item(), rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_leaving_each_sample_out(seed):
    vision, text, of_vision, of_text = correlated_samples(seed)
    influence = mir_influence(vision, text, of_vision, of_text)
    # With the outliers held fixed: those of a rule that is judged anew come and go.
    arrays = [[layer.numpy() for layer in side] for side in (vision, text)]
    weights = 1 - np.eye(80)
    fixed = np.array([_weighted_mir(*arrays, w, of_vision.numpy(), of_text.numpy()) for w in weights])
    assert np.corrcoef(influence, fixed)[0, 1] < -0.998
    jackknife = np.sqrt(79 / 80 * ((fixed - fixed.mean()) ** 2).sum())
    assert standard_error(influence).item() == pytest.approx(jackknife, rel=0.025)
    mir = modality_integration_rate(vision, text).item()
    relative = 10 ** (mir - influence.numpy() - fixed) - 1
    assert np.sqrt((relative**2).mean()) < 1e-3
    assert np.abs(relative).max() < 1.5e-3
    # The distance that each leaves is foretold to a thousandth, but for what they all leave alike: the bias of a
    # smaller probe, which is of second order and which a jackknife takes out, too.
    bias = fixed.mean() - mir
    foretold = mir + bias - 80 / 79 * influence.numpy()
    assert np.abs(10 ** (foretold - fixed) - 1).max() < 1e-3
    assert 10**bias - 1 < 1e-3


def test_intervals_cover_the_truth():
    """Over 200 redrawn probes, 95 % intervals around each hold the mean of all about that often."""
    found = []
    for seed in range(200):
        world = correlated_samples(seed)
        found.append((modality_integration_rate(*world[:2]).item(), standard_error(mir_influence(*world)).item()))
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.15)
    covered = (np.abs(values - values.mean()) <= 1.96 * errors).mean()
    assert 0.9 <= covered <= 0.985


def test_the_difference_of_two_models_on_one_probe_is_surer_than_either():
    vision, text, *samples = correlated_samples(1)
    other = [v + 0.05 * torch.randn(v.shape, generator=torch.Generator().manual_seed(2)) for v in vision]
    first, second = (mir_influence(v, text, *samples) for v in (vision, other))
    assert standard_error(first - second) < 0.2 * standard_error(first)


def test_massive_tokens_add_nothing_but_to_the_scale():
    (vision,), (text,) = hostile_layers("massive", torch.float64, layers=1)
    bad = torch.from_numpy(oracle.outliers(vision.numpy()))
    layer = _layer_of(vision, text)
    assert bad.any()
    assert (layer.by_token(0, vision)[bad] == 0).all()
    norms = text.norm(dim=1)
    worst = norms.argmax()
    scale_alone = -2 * layer.distance * (norms[worst] / norms.mean() - 1) / len(text)
    torch.testing.assert_close(layer.by_token(1, text)[worst], scale_alone)


def _layer_of(vision, text):
    from mir_lightning.functional.frechet import Gaussian

    kept = [tokens[~torch.from_numpy(oracle.outliers(tokens.numpy()))] for tokens in (vision, text)]
    gaussians = Gaussian.from_tokens(kept[0]), Gaussian.from_tokens(kept[1])
    return LayerInfluence(gaussians, (vision.norm(dim=1), text.norm(dim=1)), "paper", 0)


def test_bad_input():
    vision, text, *samples = correlated_samples(0, samples=3)
    with pytest.raises(ValueError, match="variant must be one of paper, robust, got 'official'"):
        mir_influence(vision, text, *samples, variant="official")
    with pytest.raises(ValueError, match="1 sample"):
        standard_error(torch.zeros(1))
    for wrong in ("vision_samples", "text_samples"):
        given = dict(zip(("vision_samples", "text_samples"), samples, strict=True))
        given[wrong] = given[wrong][:-1]
        with pytest.raises(ValueError, match=wrong):
            mir_influence(vision, text, **given)
