import numpy as np
import pytest
import scipy.linalg
import torch

from mir_lightning.functional import frechet_distance, trace_sqrt_product
from mir_lightning.functional.frechet import newton_schulz_trace
from tests import oracle


def _covariance(generator, d, decay=0.0, rank=None):
    """Random covariance with eigenvalues from 1 down to 10**-decay."""
    basis = np.linalg.qr(generator.standard_normal((d, d)))[0]
    spectrum = np.logspace(0, -decay, d)
    if rank is not None:
        spectrum[rank:] = 0
    return (basis * spectrum) @ basis.T


@pytest.mark.parametrize("d", [1, 2, 17, 64])
@pytest.mark.parametrize("decay", [0, 3, 6])
def test_trace_equals_scipy_sqrtm(d, decay):
    generator = np.random.default_rng(d)
    x, y = _covariance(generator, d, decay), _covariance(generator, d, decay)
    expected = np.trace(scipy.linalg.sqrtm(x @ y).real)
    given = trace_sqrt_product(torch.from_numpy(x), torch.from_numpy(y))
    assert given.dtype == torch.float64
    assert given.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(5, 5, 40), (3, 100, 40), (100, 2, 40), (30, 35, 33), (2, 2, 1)])
def test_trace_at_rank_deficiency_equals_nuclear_norm_of_tokens(n, m, d):
    generator = np.random.default_rng(n + m)
    x, y = (
        generator.standard_normal((n, d)),
        generator.standard_normal((m, d)) @ generator.standard_normal((d, d)),
    )
    x, y = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.svd(x @ y.T, compute_uv=False).sum() / np.sqrt((n - 1) * (m - 1))
    given = trace_sqrt_product(torch.from_numpy(oracle.covariance(x)), torch.from_numpy(oracle.covariance(y)))
    assert given.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("decay", [8, 12])
def test_trace_of_steep_spectra_with_a_common_basis(decay):
    """The worst case for eigenvalues of the product: they span twice the decades of the covariances."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((200, 200)))[0]
    spectrum = np.logspace(0, -decay, 200)
    x = torch.from_numpy((basis * spectrum) @ basis.T)
    assert trace_sqrt_product(x, x).item() == pytest.approx(spectrum.sum(), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0, 4, 8, 12])
@pytest.mark.parametrize("common_basis", [False, True])
def test_newton_schulz_keeps_its_bound_on_decaying_spectra(decay, common_basis, dtype, device):
    """Against exact float64; the input's own rounding to float32 is part of the error."""
    x, y = (_covariance(np.random.default_rng(seed), 300, decay) for seed in (0, 0 if common_basis else 1))
    expected = scipy.linalg.svdvals(_root(x) @ _root(y)).sum()
    given = [torch.from_numpy(a).to(device, dtype) for a in (x, y)]
    found = newton_schulz_trace(*given)
    assert abs(found.trace.item() / expected - 1) <= found.error.item() + 2e-6 < 2e-5
    assert 15 < found.steps < 30
    assert trace_sqrt_product(*given, "newton_schulz").item() == found.trace.item()
    assert trace_sqrt_product(*given, "exact").item() == pytest.approx(expected, rel=1e-6)


def _root(cov):
    eigenvalues, eigenvectors = np.linalg.eigh(cov)
    return (eigenvectors * np.sqrt(eigenvalues.clip(0))) @ eigenvectors.T


def test_newton_schulz_at_rank_deficiency_and_for_a_looser_tolerance():
    x, y = (torch.from_numpy(_covariance(np.random.default_rng(s), 80, 3, rank=20 + s)) for s in (0, 1))
    exact = trace_sqrt_product(x, y).item()
    assert newton_schulz_trace(x, y).trace.item() == pytest.approx(exact, rel=1e-5)
    loose = newton_schulz_trace(x, y, tolerance=1e-2)
    assert loose.steps < newton_schulz_trace(x, y).steps
    assert 1e-5 * exact < exact - loose.trace.item() <= loose.error.item() * exact
    assert newton_schulz_trace(torch.zeros(3, 3), torch.eye(3)).trace.item() == 0
    with pytest.raises(ValueError, match=r"tolerance must lie in 1e-6 .. 1, got 0"):
        newton_schulz_trace(x, y, tolerance=0)


def test_newton_schulz_under_reduced_precision_is_the_same():
    x, y = (torch.from_numpy(_covariance(np.random.default_rng(s), 300, 4)) for s in (0, 1))
    expected = newton_schulz_trace(x, y).trace.item()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert newton_schulz_trace(x, y).trace.item() == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_distance_equals_the_definition():
    generator = np.random.default_rng(0)
    mean_x, mean_y = generator.standard_normal((2, 48))
    cov_x, cov_y = _covariance(generator, 48, 2), _covariance(generator, 48, 2) * 3
    given = frechet_distance(*(torch.from_numpy(a) for a in (mean_x, cov_x, mean_y, cov_y)))
    assert given.item() == pytest.approx(oracle.frechet_distance(mean_x, cov_x, mean_y, cov_y), rel=1e-10)


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("decay", [0, 4, 12])
def test_distance_to_itself_is_zero_to_rounding_and_never_negative(rank, decay):
    cov = torch.from_numpy(_covariance(np.random.default_rng(1), 60, decay, rank))
    distance = frechet_distance(torch.ones(60), cov, torch.ones(60), cov).item()
    assert 0 <= distance < 1e-12 * cov.trace().item()


def test_float32_and_zero_covariances():
    zero = torch.zeros(3, 3)
    assert frechet_distance(torch.zeros(3), zero, torch.ones(3), zero).item() == 3.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 2), torch.eye(3)), ValueError, r"cov_x must be a square matrix"),
        ((torch.eye(3), torch.eye(2)), ValueError, r"one shape, got \[3, 3\] and \[2, 2\]"),
        ((torch.eye(3, dtype=torch.int64), torch.eye(3)), TypeError, r"cov_x must be a floating point"),
        ((torch.eye(3), torch.full((3, 3), float("nan"))), ValueError, r"cov_y must be finite"),
        ((torch.eye(3), torch.empty(3, 3, device="meta")), ValueError, "must be on one device, got cpu and meta"),
        (
            (torch.eye(3), torch.eye(3), "fast"),
            ValueError,
            r"method must be one of auto, exact, newton_schulz, got 'fast'",
        ),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        trace_sqrt_product(*arguments)


def test_mean_of_another_width():
    with pytest.raises(ValueError, match=r"mean_y must have shape \[3\]"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(2), torch.eye(3))
