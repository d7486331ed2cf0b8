import pickle

import pytest
import torch

from mir_lightning.functional import image_gain
from mir_lightning.metrics import ImageGain
from tests.distributed import run_on_ranks


def _samples(count=24, seed=0):
    """``(right, other, blank, tokens)``, bfloat16 values that no sum may round."""
    generator = torch.Generator().manual_seed(seed)
    losses = [(torch.rand(count, generator=generator) * 30 + 5 * i).bfloat16() for i in range(3)]
    return (*losses, torch.randint(1, 30, (count,), generator=generator))


def _fed(samples, splits=1, **options):
    metric = ImageGain(**options)
    for parts in zip(*(x.tensor_split(splits) for x in samples), strict=True):
        metric.update(*parts)
    return metric


def _both(a, b):
    return tuple(torch.cat(pair) for pair in zip(a, b, strict=True))


def _assert_is(metric, samples):
    right, other, blank, tokens = samples
    found = metric.compute_breakdown()
    expected = [x.item() for wrong in (other, blank) for x in image_gain(right, wrong, tokens, True)]
    assert list(found[:4]) == pytest.approx(expected, rel=1e-12)
    assert metric.compute().item() == pytest.approx(expected[0], rel=1e-12)
    assert found.loss == pytest.approx((right.double().sum() / tokens.sum()).item(), rel=1e-12)
    assert found.tokens == tokens.sum()
    for gains, wrong in ((found.samples, other), (found.samples_blank, blank)):
        expected = (wrong.double() - right.double()) / tokens
        torch.testing.assert_close(gains.sort().values, expected.sort().values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("splits", [1, 5, 24])
def test_any_split_into_updates_gives_the_same(splits):
    metric = _fed(_samples(), splits)
    _assert_is(metric, _samples())
    right, other, _, tokens = _samples()
    assert metric.compute_breakdown().samples.tolist() == ((other.double() - right.double()) / tokens).tolist()


def test_forward_merge_state_pickle_clone_reset_and_casts():
    samples, more = _samples(), _samples(9, seed=1)
    metric = ImageGain()
    assert metric(*samples).item() == pytest.approx(image_gain(samples[0], samples[1], samples[3]).item())
    metric.compute()  # what is cached must not survive the merge
    other = pickle.loads(pickle.dumps(_fed(more, 3))).clone().to(torch.bfloat16).half()
    metric.merge_state(other)
    _assert_is(metric, _both(samples, more))
    _assert_is(other, more)
    metric.reset()
    with pytest.raises(ValueError, match="no sample has been added"):
        metric.compute()


def _uneven(rank, world):
    """The middle rank has nothing."""
    samples = _samples()
    metric = ImageGain()
    for index in {0: range(17), 2: range(17, 24)}.get(rank, ()):
        metric.update(*(x[index : index + 1] for x in samples))
    before = len(metric.rows)
    found = metric.compute_breakdown()
    assert len(metric.rows) == before, "the local stream must go on"
    return list(found)


def test_ranks_see_all_samples():
    expected = list(_fed(_samples()).compute_breakdown())
    for found in run_on_ranks(_uneven, 3):
        assert found[:6] == expected[:6]
        assert [x.tolist() for x in found[6:]] == [x.tolist() for x in expected[6:]]


def test_plot_draws_every_sample_and_values_over_time():
    metric = _fed(_samples())
    found = metric.compute_breakdown()
    _, axes = metric.plot()
    other, blank, _zero = axes.get_lines()
    assert list(other.get_xdata()) == sorted(found.samples.tolist())
    assert list(blank.get_xdata()) == sorted(found.samples_blank.tolist())
    _, axes = metric.plot([torch.tensor(0.3), torch.tensor(0.5)])
    assert any(list(line.get_ydata()) == pytest.approx([0.3, 0.5]) for line in axes.get_lines())


def test_bad_arguments():
    metric, losses = ImageGain(), torch.ones(2)
    with pytest.raises(ValueError, match=r"blank and tokens must both be \[N\].*\[3\] and \[2\]"):
        metric.update(losses, losses, torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="other holds NaN or inf at sample 0"):
        metric.update(losses, losses * torch.nan, losses, torch.ones(2))
    assert not metric.rows
