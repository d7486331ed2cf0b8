import numpy as np
import pytest
import torch

from mir_lightning.functional import modality_integration_rate
from mir_lightning.functional.frechet import token_frechet_distance
from tests import oracle
from tests.streams import hostile_layers


def _tokens(n, d, seed, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    tokens = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + offset
    return tokens.requires_grad_()


@pytest.mark.parametrize(("n", "m", "d"), [(12, 9, 4), (4, 5, 7), (3, 12, 5), (12, 3, 5), (2, 2, 1), (4, 4, 8)])
def test_gradcheck_at_any_rank(n, m, d):
    x, y = _tokens(n, d, 0, 0.3), _tokens(m, d, 1)
    assert torch.autograd.gradcheck(token_frechet_distance, (x, y), eps=1e-6, atol=1e-6)
    expected = oracle.token_frechet_distance(x.detach().numpy(), y.detach().numpy())
    assert token_frechet_distance(x, y).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("variant", ["paper", "robust", "official"])
def test_gradcheck_of_the_whole_rate(variant):
    """Scale and outlier rule included: one token of each modality is an outlier."""
    vision, text = _tokens(30, 3, 0, 0.5), _tokens(20, 3, 1)
    with torch.no_grad():
        vision[4] *= 100
        text[7] *= 100

    def rate(v, t):
        return modality_integration_rate([v, 2 * v], [t, t], variant, differentiable=True)

    assert torch.autograd.gradcheck(rate, (vision, text), eps=1e-6, atol=1e-6)
    rate(vision, text).backward()
    assert bool(vision.grad[4].abs().sum() == 0)


@pytest.mark.parametrize("kind", ["plain", "massive", "huge_mean", "few_tokens", "constant", "duplicated"])
@pytest.mark.parametrize("variant", ["paper", "robust", "official"])
def test_value_is_the_other_forms_and_gradients_are_finite(kind, variant):
    vision, text = hostile_layers(kind)
    expected, layers = modality_integration_rate(vision, text, variant, return_layers=True)
    for tokens in (*vision, *text):
        tokens.requires_grad_()
    mir, given = modality_integration_rate(vision, text, variant, return_layers=True, differentiable=True)
    np.testing.assert_allclose(given.detach(), layers, rtol=1e-8)
    assert mir.item() == pytest.approx(expected.item(), rel=1e-8)
    mir.backward()
    for tokens in (*vision, *text):
        assert tokens.grad.isfinite().all()
        assert tokens.grad.abs().sum() > 0
    assert not modality_integration_rate(vision, text, variant).requires_grad


def test_descending_the_gradient_aligns_the_tokens():
    vision, text = _tokens(200, 8, 0, 2.0), _tokens(150, 8, 1)
    text.requires_grad_(False)
    optimizer = torch.optim.Adam([vision], lr=0.1)
    start = modality_integration_rate([vision], [text]).item()
    for _ in range(60):
        optimizer.zero_grad()
        modality_integration_rate([vision], [text], differentiable=True).backward()
        optimizer.step()
    assert modality_integration_rate([vision], [text]).item() < start - 1


def test_official_fast_is_refused():
    with pytest.raises(ValueError, match='differentiable=True takes variant "paper", "robust" or "official"'):
        modality_integration_rate([torch.eye(3)], [torch.eye(3)], "official-fast", differentiable=True)
