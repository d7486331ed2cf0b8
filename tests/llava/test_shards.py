"""Streaming from shards: each sample once, the same order after an interruption, from disk and object store."""

import re
from itertools import islice

import pytest

from mir_lightning.llava.data.shards import Shards, with_replacements
from mir_lightning.probing.images import UnreadableImageError
from tests.distributed import run_on_ranks
from tests.shards import UNREADABLE, record, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards") / "llava")


@pytest.fixture(scope="module")
def bucket(shards):
    """The same in an object store, spoken to over the network interface of this machine."""
    import boto3
    from litdata.streaming import downloader
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        server.start()
        _, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setitem(downloader._OBSTORE_CLIENT_OPTIONS, "allow_http", "true")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="data-bucket")
        for file in shards.iterdir():
            client.upload_file(str(file), "data-bucket", f"llava/{file.name}")
        yield "s3://data-bucket/llava"
        server.stop()


def _numbers(samples):
    """Which samples, told by their texts; of unreadable ones, what was said."""
    said = [str(sample.turns or sample.unreadable) for sample in samples]
    return [int(re.search(r"(Number|sample) (\d+)", text)[2]) for text in said]


def _epoch(loader):
    return [number for batch in loader for number in batch]


def _loader(place, workers, scale=None):
    source = Shards(place)
    training, held_out = source.split(6, scale, seed=3)
    return source.stream(training, _numbers, batch_size=4, num_workers=workers), held_out


@pytest.fixture(params=["folder", "object store"])
def place(request):
    return str(request.getfixturevalue({"folder": "shards", "object store": "bucket"}[request.param]))


def test_an_epoch_has_every_sample_once_and_none_that_is_held_out(place):
    loader, held_out = _loader(place, 0)  # workers are processes of their own and would ask the store over TLS
    epochs = [_epoch(loader), _epoch(loader)]
    assert len(loader) == 9
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    missing = set(_numbers(held_out)) | {UNREADABLE}
    assert {*epochs[0]} | missing == set(range(40))
    assert len(set(epochs[0]) & set(_numbers(held_out))) == 0
    smaller, again = _loader(place, 0, scale=10)
    assert _numbers(again) == _numbers(held_out)
    assert len(set(_epoch(smaller))) == 10


@pytest.mark.parametrize(("workers", "done"), [(0, 1), (0, 4), (0, 8), pytest.param(2, 5, marks=pytest.mark.slow)])
def test_an_interrupted_epoch_goes_on_where_it_was(shards, workers, done):
    loader, _ = _loader(shards, workers)
    epoch = iter(loader)
    begun = list(islice(epoch, done))
    state = loader.state_dict()
    rest, following = list(epoch), list(loader)
    again, _ = _loader(shards, workers)
    again.load_state_dict(state)
    assert list(again) == rest
    assert list(again) == following
    assert len(begun) + len(rest) == len(following) == 9


def test_the_next_of_the_batch_takes_the_place_of_an_unreadable_sample():
    samples = [Shards("here").sample(record(index)) for index in (UNREADABLE, 3, 4, UNREADABLE)]
    taken = with_replacements(list, samples)
    assert _numbers(taken) == [3, 3, 4, 3]
    assert [len(s.unreadable) for s in taken] == [1, 0, 0, 1]
    assert f"here, sample {UNREADABLE}: cannot identify" in taken[0].unreadable[0]
    with pytest.raises(UnreadableImageError, match="a whole batch cannot be read"):
        with_replacements(list, samples[:1])


def test_what_is_no_record_or_no_shards_is_named(tmp_path, shards):
    with pytest.raises(ValueError, match=r'here, sample 5 .*"conversations" must be a list'):
        Shards("here").sample({"id": "5", "image": b"", "conversations": "none"})
    with pytest.raises(ValueError, match="must be an object"):
        Shards("here").sample([1, 2])
    with pytest.raises(ValueError, match="image must be the bytes of one picture, it is list"):
        Shards("here").sample({**record(1), "image": [b""]})
    empty = {**record(1), "image": b""}
    assert "sample 1: cannot identify" in Shards("here").sample(empty).unreadable[0]
    empty["conversations"][0]["value"] = "Hello."  # no picture is asked for: text alone
    sample = Shards("here").sample(empty)
    assert (sample.images, sample.unreadable) == ((), ())
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds no shards that can be read"):
            Shards(str(place)).split(1, None, 0)
    with pytest.raises(ValueError, match="need more than the 40 samples"):
        Shards(str(shards)).split(6, 35, 0)


def _epoch_of_rank(rank, world, shards):
    loader, held_out = _loader(shards, 0)
    numbers = _epoch(loader)
    again, _ = _loader(shards, 0)
    begun = list(islice(iter(again), 2))
    rest, _ = _loader(shards, 0)
    rest.load_state_dict(again.state_dict())
    return numbers, _numbers(held_out), [*begun, *rest] == list(_loader(shards, 0)[0])


def test_ranks_share_an_epoch_and_the_held_out_samples(shards):
    parts = run_on_ranks(_epoch_of_rank, 2, str(shards))
    (first, held_out, resumed), (second, same, also) = parts
    assert held_out == same
    assert resumed
    assert also
    assert len(first) == len(second) >= 34 / 2 - 7  # whole shards, cut to those of the rank with the fewest
    assert len({*first, *second, *held_out}) >= 2 * len(first) + 6 - 1  # one stands in for the unreadable one
