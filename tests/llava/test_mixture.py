from collections import Counter

import pytest
import torch
from PIL import Image

from mir_lightning.llava.data.batches import EpochBatches
from mir_lightning.llava.data.mixture import Mixture, Share, apportion
from mir_lightning.llava.data.module import PretrainingData
from mir_lightning.llava.data.records import Records
from mir_lightning.llava.data.shards import Shards
from mir_lightning.llava.data.source import IndexedSource, Sample
from mir_lightning.llava.demo.shapes import Shapes
from tests.shards import write_shards


class Numbered(IndexedSource):
    """So many samples, each of which says its number."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return Sample((Image.new("RGB", (8, 8)),), ("<image>", str(index)))


def _mixture(sizes=(60, 100, 30), weights=(0.45, 0.45, 0.1), **options):
    names = ("captions", "interleaved", "text")
    return Mixture([Share(n, Numbered(s), w) for n, s, w in zip(names, sizes, weights, strict=False)], **options)


def _epoch(training, epoch=0):
    indices = training.order(torch.Generator().manual_seed(epoch)).tolist()
    assert len(indices) == len(training)
    return [training[index] for index in indices]


def _counts(samples):
    return Counter(sample.source for sample in samples)


def test_three_sources_are_mixed_as_in_mm1():
    training, held_out = _mixture(weights=(None,) * 3).split(20, 100, 0)
    assert _counts(held_out) == {"captions": 9, "interleaved": 9, "text": 2}
    assert _counts(_epoch(training)) == {"captions": 45, "interleaved": 45, "text": 10}
    assert len(_counts(held_out[:5])) == 3  # the first ones are a mixture, too


def test_no_sample_is_held_out_and_trained_on():
    training, held_out = _mixture().split(20, None, 0)
    told = {(sample.source, sample.turns[1]) for sample in held_out}
    assert len(told) == 20
    assert not told & {(sample.source, sample.turns[1]) for sample in _epoch(training)}


@pytest.mark.parametrize(
    ("exhausted", "expected"),
    [
        # 60, 100 and 30 samples by 45, 45 and 10 %: of 134 the first source is through, of 300 the last one.
        ("stop", {"captions": 60, "interleaved": 60, "text": 14}),
        ("repeat", {"captions": 135, "interleaved": 135, "text": 30}),
        ("drop", {"captions": 60, "interleaved": 100, "text": 30}),
    ],
)
def test_exhausted_sources_by_policy(exhausted, expected):
    training, _ = _mixture(exhausted=exhausted).split(0, None, 0)
    first, second = _epoch(training), _epoch(training, 1)
    assert _counts(first) == _counts(second) == expected
    assert [sample.turns for sample in first] != [sample.turns for sample in second]
    times = Counter((sample.source, sample.turns[1]) for sample in first)
    assert max(times.values()) == (3 if exhausted == "repeat" else 1)
    for name, size in (("captions", 60), ("interleaved", 100), ("text", 30)):
        of_source = [count for (source, _), count in times.items() if source == name]
        assert max(of_source) - min(of_source) <= (len(of_source) == size)  # none a third time before all a second


def test_the_others_go_on_by_their_weights():
    samples = _epoch(_mixture(exhausted="drop").split(0, None, 0)[0])
    assert _counts(samples[:134]) == {"captions": 60, "interleaved": 60, "text": 14}
    assert _counts(samples[134:183]) == {"interleaved": 40, "text": 9}
    assert _counts(samples[183:]) == {"text": 7}


def test_the_same_samples_at_a_scale_in_every_epoch():
    training, _ = _mixture().split(0, 40, 0)
    drawn = [{(s.source, s.turns[1]) for s in _epoch(training, epoch)} for epoch in range(3)]
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(drawn[0]) == 40


def test_whole_numbers_in_proportion():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        weights = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        total = int(torch.randint(0, 500, (1,), generator=generator))
        found = apportion(weights, total)
        assert sum(found) == total
        exact = [total * weight / sum(weights) for weight in weights]
        assert all(abs(a - b) < 1 for a, b in zip(found, exact, strict=True))
    assert apportion([0.45, 0.45, 0.1], 100) == [45, 45, 10]


def test_ranks_share_an_epoch_and_go_on_in_it():
    training, _ = _mixture(exhausted="drop").split(0, None, 0)

    def batches(rank, ranks, done=0):
        size = 12 // ranks
        return list(EpochBatches(len(training), size, 7, lambda: (2, done), rank, ranks, training.order))

    whole = batches(0, 1)
    for first, second, both in zip(batches(0, 2), batches(1, 2), whole, strict=False):
        assert sorted(first + second) == sorted(both)
    assert batches(0, 1, done=5) == whole[5:]


def test_a_source_by_kind_of_drawn_shapes():
    kinds = [Share(kind, Shapes(kind)) for kind in ("captions", "interleaved", "text")]
    training, held_out = Mixture(kinds).split(20, 50, 0)
    for sample in [*held_out, *_epoch(training)]:
        pictures = len(sample.images)
        assert pictures == sum(turn.count("<image>") for turn in sample.turns)
        assert {"captions": pictures == 1, "interleaved": 1 < pictures < 5, "text": pictures == 0}[sample.source]


@pytest.mark.parametrize("weights", [(0.5, 0.4, 0.2), (1.2, -0.3, 0.1), (0.5, 0.5, 0.0), (0.5, None, 0.5)])
def test_weights_that_do_not_fit(weights):
    with pytest.raises(ValueError, match="weights must be above 0 and sum to 1, got"):
        _mixture(weights=weights)


def test_what_cannot_be_mixed(tmp_path):
    with pytest.raises(ValueError, match="weights must be above 0 and sum to 1"):
        Mixture([])
    with pytest.raises(ValueError, match=r"names must differ .* got \['a', 'a'\]"):
        Mixture([Share("a", Shapes(), 0.5), Share("a", Shapes(), 0.5)])
    with pytest.raises(ValueError, match='hold no "/"'):
        Mixture([Share("a/b", Shapes(), 1.0)])
    with pytest.raises(ValueError, match="exhausted must be one of stop, repeat, drop, got 'end'"):
        _mixture(exhausted="end")
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match="source 'a' has no samples to train on: none"):
        Mixture([Share("a", Records([tmp_path / "none.json"], tmp_path), 1.0)]).split(0, None, 0)
    with pytest.raises(ValueError, match="of its 10 samples 10 are held out"):
        Mixture([Share("a", Numbered(10), 1.0)]).split(10, None, 0)
    for exhausted in ("stop", "drop"):
        with pytest.raises(ValueError, match=r"data_scale=500 .* \(60 of 'captions'"):
            _mixture(exhausted=exhausted).split(0, 500, 0)
    assert len(_mixture(exhausted="repeat").split(0, 500, 0)[0]) == 500


def test_a_stream_is_refused(tmp_path):
    folder = write_shards(tmp_path)
    with pytest.raises(ValueError, match=r"source 'a' is streamed \(Shards\): it cannot be mixed"):
        Mixture([Share("a", Shards(str(folder)), 1.0)]).split(2, None, 0)


def test_data_count_what_was_drawn():
    data = PretrainingData(_mixture(), probe_size=10)
    data.on_before_batch_transfer({"source": ["captions", "text", "captions", ""]}, 0)
    assert data.drawn == {"captions": 2, "interleaved": 0, "text": 1}
    other = PretrainingData(_mixture(), probe_size=10)
    other.load_state_dict(data.state_dict())
    assert other.drawn == data.drawn
