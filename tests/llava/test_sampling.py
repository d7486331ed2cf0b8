"""The order of samples: complete, the same for any number of ranks, and resumable at any batch."""

from itertools import chain

import pytest

from mir_lightning.llava.data.batches import EpochBatches

LENGTHS = [(37 * i) % 101 for i in range(103)]


def _batches(lengths=LENGTHS, size=4, epoch=0, done=0, rank=0, ranks=1, seed=0):
    return list(EpochBatches(lengths, size, seed, lambda: (epoch, done), rank, ranks))


@pytest.mark.parametrize("lengths", [LENGTHS, len(LENGTHS)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_sample_once_an_epoch_in_the_same_global_batches(lengths, ranks):
    shares = [_batches(lengths, 12 // ranks, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    together = [sorted(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert together == [sorted(batch) for batch in _batches(lengths, 12)]
    assert sorted(chain(*together)) == list(range(len(LENGTHS)))
    assert len(EpochBatches(lengths, 12 // ranks, 0, lambda: (0, 50), 0, ranks)) == len(together)


def test_an_epoch_goes_on_where_it_was():
    whole = _batches()
    for done in range(len(whole) + 1):
        assert _batches(done=done) == whole[done:]


def test_epochs_and_seeds_differ():
    orders = [_batches(), _batches(epoch=1), _batches(seed=1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_batches_are_of_like_length():
    spread = [max(b) - min(b) for b in ([LENGTHS[i] for i in batch] for batch in _batches()[:-1])]
    shuffled = [max(b) - min(b) for b in ([LENGTHS[i] for i in batch] for batch in _batches(len(LENGTHS))[:-1])]
    assert sum(spread) < sum(shuffled) / 5
    means = [sum(LENGTHS[i] for i in batch) for batch in _batches()]
    assert means != sorted(means)


def test_fewer_samples_left_than_ranks_are_dropped():
    assert [len(_batches(9, 4, rank=rank, ranks=2)) for rank in (0, 1)] == [1, 1]
