import numpy as np
import pytest
import torch

from mir_lightning.metrics.moments import mean_and_covariance, merge_moments, moments_of, update_moments


@pytest.mark.parametrize("width", [1, 5, 256, 300])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_update_and_merge_equal_numpy(width, offset):
    tokens = np.random.default_rng(width).standard_normal((700, width)) + offset
    rows = torch.from_numpy(tokens)
    packed = moments_of(rows[:1])
    update_moments(packed, rows[1:300])
    packed = merge_moments(packed, moments_of(rows[300:]), width)
    mean, cov = mean_and_covariance(packed, width)
    np.testing.assert_allclose(mean, tokens.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(cov, np.cov(tokens.T).reshape(width, width), rtol=1e-10, atol=1e-12)


def test_half_the_matrix_is_kept():
    assert moments_of(torch.randn(2, 2048)).nbytes < 0.57 * 8 * 2048**2
