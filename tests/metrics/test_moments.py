import numpy as np
import pytest
import torch

from mir_lightning.metrics.moments import mean_and_covariance, merge_moments, moments_of, update_moments


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("width", [1, 5, 256, 300])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_update_and_merge_equal_numpy(width, offset, dtype, tolerance):
    tokens = np.random.default_rng(width).standard_normal((700, width)) + offset
    rows = torch.from_numpy(tokens)
    moments = moments_of(rows[:1], dtype)
    update_moments(moments, rows[1:300])
    moments = merge_moments(moments, moments_of(rows[300:], dtype))
    mean, cov = mean_and_covariance(moments)
    np.testing.assert_allclose(mean, tokens.mean(0), rtol=1e-12, atol=1e-12)
    expected = np.cov(tokens.T).reshape(width, width)
    np.testing.assert_allclose(cov, expected, rtol=100 * tolerance, atol=tolerance)


def test_half_the_matrix_is_kept():
    assert moments_of(torch.randn(2, 2048)).second.nbytes < 0.57 * 8 * 2048**2
    assert moments_of(torch.randn(2, 2048), torch.float32).second.nbytes < 0.57 * 4 * 2048**2


def test_merging_changes_neither_side():
    first, second = moments_of(torch.randn(9, 3)), moments_of(torch.randn(5, 3))
    copies = [part.clone() for part in (*first, *second)]
    update_moments(merge_moments(first, second), torch.randn(4, 3))
    assert all(torch.equal(a, b) for a, b in zip((*first, *second), copies, strict=True))
