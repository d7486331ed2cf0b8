import math

import numpy as np
import pytest
import torch

from mir_lightning.functional import image_gain


def _samples(count=400, dtype=torch.float32, seed=0):
    """Captions of 3 to 40 tokens whose gain a token differs from sample to sample."""
    generator = np.random.RandomState(seed)
    tokens = generator.randint(3, 41, count)
    right = tokens * generator.gamma(4.0, 0.5, count)
    wrong = right + tokens * generator.normal(0.3, 0.8, count)
    return [torch.tensor(x).to(dtype) for x in (right, wrong)] + [torch.tensor(tokens)]


def _oracle(right, wrong, tokens):
    right, wrong, tokens = (x.double().cpu().numpy() for x in (right, wrong, tokens))
    gain = (wrong.sum() - right.sum()) / tokens.sum()
    residuals = [(w - r) - gain * t for r, w, t in zip(right, wrong, tokens, strict=True)]
    spread = len(tokens) / (len(tokens) - 1) * sum(r**2 for r in residuals)
    return gain, math.sqrt(spread) / tokens.sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_equals_the_definition(dtype, offset, device):
    right, wrong, tokens = (x.to(device) for x in _samples(dtype=dtype))
    right, wrong = right + offset, wrong + offset
    expected = _oracle(right, wrong, tokens)
    found = image_gain(right, wrong, tokens, return_standard_error=True)
    np.testing.assert_allclose([x.cpu() for x in found], expected, rtol=1e-12)
    assert {x.dtype for x in found} == {torch.float64}
    assert image_gain(right, wrong, tokens) == found[0]


def test_the_standard_error_is_that_of_the_jackknife():
    """Over the gains without one sample each; linear in 1/N, so within 1 % at 400."""
    right, wrong, tokens = _samples()
    count = len(tokens)
    left_out = [image_gain(*(x[torch.arange(count) != i] for x in (right, wrong, tokens))) for i in range(count)]
    gains = np.array(left_out)
    jackknife = math.sqrt((count - 1) / count * ((gains - gains.mean()) ** 2).sum())
    assert image_gain(right, wrong, tokens, True)[1].item() == pytest.approx(jackknife, rel=0.01)


def test_one_sample_alone_has_no_standard_error():
    gain, error = image_gain(torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([4]), True)
    assert gain == 0.5
    assert error.isnan()


@pytest.mark.parametrize(
    ("right", "wrong", "tokens", "error", "message"),
    [
        ([1.0], [1.0, 2.0], [1, 1], ValueError, r"right and tokens must both be \[N\].* got \[1\] and \[2\]"),
        ([[1.0]], [1.0], [1], ValueError, r"right and tokens must both be \[N\].* got \[1, 1\] and \[1\]"),
        ([], [], [], ValueError, "at least one sample"),
        ([1.0, 2.0], [1.0, math.inf], [1, 1], ValueError, "wrong holds NaN or inf at sample 1"),
        ([1.0, 2.0], [1.0, 2.0], [1, 0], ValueError, "tokens must be above 0: leave out samples without"),
        ([1, 2], [1.0, 2.0], [1, 1], TypeError, r"right must be a floating point tensor \[N\], got torch.int64"),
    ],
)
def test_bad_arguments(right, wrong, tokens, error, message):
    with pytest.raises(error, match=message):
        image_gain(*(torch.tensor(x) for x in (right, wrong, tokens)))
