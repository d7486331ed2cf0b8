import numpy as np
import pytest
import torch

from mir_lightning.functional import soft_discrimination_score
from mir_lightning.functional.sds import right_shares


def _oracle(scores):
    """Probability of candidate 0 and whether it is the best, item by item, from the definition."""
    probabilities, right = [], []
    for item in scores:
        s = item.double().cpu().numpy()
        exponentials = np.exp(s - s.max())
        probabilities.append(exponentials[0] / exponentials.sum())
        best = np.flatnonzero(s == s.max())
        right.append((0 in best) / len(best))
    return np.array(probabilities), np.array(right)


def _ragged(dtype=torch.float32, items=50, scale=3.0, offset=0.0):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 7, (items,), generator=generator).tolist()
    return [(torch.randn(n, generator=generator) * scale + offset).to(dtype) for n in sizes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "offset"), [(3.0, 0.0), (300.0, 0.0), (1.0, -5000.0), (0.0, 7.0)])
def test_equals_the_definition(dtype, scale, offset, device):
    scores = [s.to(device) for s in _ragged(dtype, scale=scale, offset=offset)]
    probabilities, right = _oracle(scores)
    np.testing.assert_allclose(
        soft_discrimination_score(scores, "none").cpu(), probabilities, rtol=1e-12, atol=1e-300
    )
    assert soft_discrimination_score(scores).item() == pytest.approx(probabilities.mean(), rel=1e-12)
    assert soft_discrimination_score(scores).dtype == torch.float64
    np.testing.assert_allclose(right_shares(scores).cpu(), right, rtol=1e-15)


def test_equal_scores_are_at_chance_in_both_numbers():
    scores = [torch.zeros(n) for n in (2, 3, 4)]
    expected = [1 / 2, 1 / 3, 1 / 4]
    np.testing.assert_allclose(soft_discrimination_score(scores, "none"), expected)
    np.testing.assert_allclose(right_shares(scores), expected)


def test_a_matrix_is_items_of_equal_size_and_gradients_reach_the_scores():
    matrix = torch.randn(4, 3, requires_grad=True)
    score = soft_discrimination_score(matrix)
    assert score.item() == pytest.approx(_oracle(list(matrix.detach()))[0].mean())
    score.backward()
    assert matrix.grad[:, 0].min() > 0 > matrix.grad[:, 1:].max()


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([], ValueError, "scores is empty"),
        (torch.zeros(3), ValueError, r"one tensor \[candidates\] an item, got one tensor \[3\]"),
        (
            [torch.zeros(2), torch.zeros(1)],
            ValueError,
            r"item 1 must be \[candidates\] with at least 2 .*got \[1\]",
        ),
        ([torch.zeros(2, 2)], ValueError, r"item 0 must be \[candidates\].*got \[2, 2\]"),
        ([torch.zeros(2), torch.tensor([1.0, torch.nan])], ValueError, "item 1 hold NaN or inf"),
        ([torch.zeros(2).int()], TypeError, "item 0 must be a floating point tensor .*got torch.int32"),
        ([[1.0, 2.0]], TypeError, "item 0 must be a floating point tensor .*got list"),
    ],
)
def test_bad_scores(scores, error, message):
    with pytest.raises(error, match=message):
        soft_discrimination_score(scores)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="reduction must be one of mean, none, got 'sum'"):
        soft_discrimination_score([torch.zeros(2)], "sum")
