import numpy as np
import pytest
import scipy.linalg
import torch

from mir_lightning.functional import modality_integration_rate
from mir_lightning.functional.mir import judge, kept_by
from tests import oracle
from tests.streams import KINDS, hostile_layers


def _numpy(layers):
    return [layer.detach().double().cpu().numpy() for layer in layers]


@pytest.mark.parametrize("variant", ["paper", "robust", "official"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_oracle_on_hostile_tokens(kind, dtype, variant, device):
    vision, text = hostile_layers(kind, dtype, device=device)
    mir, layers = modality_integration_rate(vision, text, variant, return_layers=True)
    expected = oracle.mir_layers(_numpy(vision), _numpy(text), variant)
    assert layers.dtype == torch.float64
    np.testing.assert_allclose(layers.cpu(), expected, rtol=1e-8)
    assert mir.item() == pytest.approx(np.log10(expected.sum()), rel=1e-8)


def test_massive_tokens_would_dominate_without_the_outlier_rule():
    vision, text = hostile_layers("massive", torch.float32)[0], hostile_layers("plain", torch.float32)[1]
    v, t = _numpy(vision)[0], _numpy(text)[0]
    with_all = oracle.token_frechet_distance(*(x / np.linalg.norm(t, axis=1).mean() for x in (v, t)))
    _, layers = modality_integration_rate(vision, text, return_layers=True)
    assert with_all > 10 * layers[0].item()


def test_many_massive_tokens_mask_themselves_from_the_paper_rule_and_not_from_the_robust_one():
    """A fifth at 50 to 100 times the norm: 3 sigma keeps them all."""
    (plain, text), (masked, _) = hostile_layers("plain", layers=1), hostile_layers("masked_vision", layers=1)
    healthy, paper, robust = (
        modality_integration_rate(vision, text, variant).item()
        for vision, variant in ((plain, "paper"), (masked, "paper"), (masked, "robust"))
    )
    assert paper > healthy + 1
    assert robust == pytest.approx(healthy, abs=0.05)


def test_tokens_nearly_alike_are_no_outliers_of_the_robust_rule():
    """Norms of 1 with a spread of 1e-4, a tenth of them with 0.02: odd, but not massive. 1.2 is."""
    norms = 1 + 1e-4 * torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms[:100] += 0.02
    norms[0] = 1.2
    rules = judge(norms)
    assert (~kept_by("robust", rules.classes(norms))).nonzero().tolist() == [[0]]
    assert rules.robust.item() == pytest.approx(3 * 0.02 * norms.median().item())


def test_official_equals_the_accurate_mode_with_scipy_sqrtm():
    """`sqrtm` of the product of covariances, real part, as the released code's accurate mode."""
    vision, text = hostile_layers("massive", torch.float64)
    expected = []
    for v, t in zip(_numpy(vision), _numpy(text), strict=True):
        alpha = 1 / np.linalg.norm(t, axis=1).mean()
        v, t = (np.where(oracle.outliers(x)[:, None], oracle.lower_median(x), x) for x in (alpha * v, alpha * t))
        expected.append(oracle.frechet_distance(v.mean(0), oracle.covariance(v), t.mean(0), oracle.covariance(t)))
    given = modality_integration_rate(vision, text, "official")
    assert given.item() == pytest.approx(np.log10(sum(expected)), rel=1e-6)


def test_official_fast_subtracts_the_trace_of_the_product_itself():
    """In exact arithmetic the released default never leaves Y = A, so it subtracts 2 Tr(S_v S_t)."""
    generator = torch.Generator().manual_seed(0)
    vision = torch.randn(4000, 6, generator=generator)
    text = torch.randn(4000, 6, generator=generator)
    given = modality_integration_rate([vision], [text], "official-fast").item()
    alpha = 1 / text.norm(dim=1).mean()
    v, t = (
        np.where(oracle.outliers(x)[:, None], oracle.lower_median(x), x)
        for x in ((alpha * vision).double().numpy(), (alpha * text).double().numpy())
    )
    cov_v, cov_t = oracle.covariance(v), oracle.covariance(t)
    gap = np.trace(cov_v) + np.trace(cov_t) - 2 * np.trace(cov_v @ cov_t)
    assert given == pytest.approx(np.log10(((v.mean(0) - t.mean(0)) ** 2).sum() + gap), rel=1e-4)
    right = np.trace(scipy.linalg.sqrtm(cov_v @ cov_t).real)
    assert abs(gap - (np.trace(cov_v) + np.trace(cov_t) - 2 * right)) > 0.5


def test_official_fast_with_fewer_tokens_than_dimensions_says_what_would_do():
    vision, text = torch.zeros(3, 5), torch.randn(3, 5)
    with pytest.raises(ValueError, match=r'"official-fast" inverts .* layer 0, which is singular'):
        modality_integration_rate([vision], [text], "official-fast")


def test_scale_of_all_tokens_does_not_matter():
    vision, text = hostile_layers("massive", torch.float64)
    scaled = modality_integration_rate([1e-3 * v for v in vision], [1e-3 * t for t in text])
    assert scaled.item() == pytest.approx(modality_integration_rate(vision, text).item(), rel=1e-10)


@pytest.mark.parametrize(
    ("vision", "text", "error", "message"),
    [
        ([torch.randn(4, 3)], [], ValueError, "same number of layers, at least one, got 1 and 0"),
        ([torch.randn(4, 3)], [torch.randn(4, 2)], ValueError, "one width, got 3 and 2"),
        ([torch.randn(1, 3)], [torch.randn(4, 3)], ValueError, r"vision has 1 token\(s\) in layer 0"),
        ([torch.randn(4, 3)], [torch.randn(0, 3)], ValueError, r"text has 0 token\(s\) in layer 0"),
        ([torch.randn(4, 3)], [torch.zeros(4, 3)], ValueError, "text tokens of layer 0 are all zero"),
        ([torch.ones(4, 3, dtype=torch.int64)], [torch.randn(4, 3)], TypeError, "vision tokens .* floating"),
        ([torch.randn(4)], [torch.randn(4, 3)], ValueError, r"must be \[n, d\], got \[4\]"),
        ([torch.randn(4, 3)], [torch.empty(4, 3, device="meta")], ValueError, "one device, got cpu and meta"),
        (
            [torch.randn(4, 3)] * 2,
            [torch.randn(4, 3), torch.full((4, 3), float("inf"))],
            ValueError,
            r"text hidden states of layer 1 hold NaN or inf \(4 of 4 tokens\)",
        ),
    ],
)
def test_bad_input(vision, text, error, message):
    with pytest.raises(error, match=message):
        modality_integration_rate(vision, text)


def test_unknown_variant():
    with pytest.raises(
        ValueError, match="variant must be one of paper, robust, official, official-fast, got 'fast'"
    ):
        modality_integration_rate([torch.randn(4, 3)], [torch.randn(4, 3)], "fast")


def test_the_standard_deviation_of_the_outlier_rule_is_unbiased():
    """One of 8 norms apart from the others is an inlier for n - 1, and would be an outlier for n."""
    norms = np.array([1.0] * 7 + [2.0])
    assert 3 * norms.std() < 1 < 3 * norms.std(ddof=1)
    directions = np.random.default_rng(0).standard_normal((8, 3))
    vision = directions / np.linalg.norm(directions, axis=1, keepdims=True) * norms[:, None]
    text = np.random.default_rng(1).standard_normal((30, 3))
    given = modality_integration_rate([torch.from_numpy(vision)], [torch.from_numpy(text)])
    assert given.item() == pytest.approx(oracle.mir([vision], [text]), rel=1e-9)
