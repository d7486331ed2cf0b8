import warnings

import pytest
import torch

from mir_lightning.probing import Probe
from mir_lightning.probing.exchange import Exchange, _pictures
from mir_lightning.probing.network import Network, ProbeWarning
from tests.families import build_family, family_batch
from tests.models import IMAGE_TOKEN, tiny_batch, tiny_llava


def _exchange(*batches, seed=0, network=None):
    return Exchange(network or Network(tiny_llava()), Probe(batches), seed)


def _columns(batch, columns):
    """The same with fewer positions."""
    return {key: value[:, columns] if value.ndim == 2 else value for key, value in batch.items()}


def test_two_samples_swap():
    assert _exchange(tiny_batch(batch=2)).text_of.tolist() == [1, 0]
    assert _exchange(tiny_batch(batch=1), tiny_batch(seed=1, batch=1, after=4)).text_of.tolist() == [1, 0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_text_sees_another_picture_and_every_picture_is_seen_once(seed):
    exchange = _exchange(tiny_batch(batch=7), tiny_batch(seed=1, batch=4), seed=seed)
    assert sorted(exchange.text_of.tolist()) == list(range(11))
    assert not (exchange.text_of == torch.arange(11)).any()
    assert exchange.paired.all()
    singles = [{k: v[i : i + 1] for k, v in tiny_batch(batch=7).items()} for i in range(7)]
    again = _exchange(*singles, tiny_batch(seed=1, batch=4), seed=seed)
    assert again.text_of.tolist() == exchange.text_of.tolist(), "whatever the batches"
    assert _exchange(tiny_batch(batch=7), tiny_batch(seed=1, batch=4), seed=seed + 9).text_of.tolist() != (
        exchange.text_of.tolist()
    )


def test_texts_move_with_all_that_is_theirs_and_pictures_stay():
    batches = [tiny_batch(batch=2, padded=0), tiny_batch(seed=1, batch=2, after=4, padded=1)]
    for batch in batches:
        batch["position_ids"] = torch.arange(3 * batch["labels"].numel()).view(3, *batch["labels"].shape)
        batch["attention_mask"] = batch["attention_mask"].float()
        batch["image_sizes"] = torch.tensor([[12, 12], [12, 12]])
    exchange = _exchange(*batches)
    own, exchanged = ([batches[i][0] for i in range(2)] for batches in exchange.arms)
    texts = [(batch, row) for batch in own for row in range(2)]
    for (batch, seen), of_batch in zip(zip(own, exchanged, strict=True), exchange.text_of.view(2, 2), strict=True):
        assert torch.equal(seen["pixel_values"], batch["pixel_values"])
        assert torch.equal(seen["image_sizes"], batch["image_sizes"])
        for row, text in enumerate(of_batch.tolist()):
            source, place = texts[text]
            length = source["labels"].shape[1]
            for key, padding in (("input_ids", 0), ("attention_mask", 0), ("labels", -100), ("position_ids", 0)):
                assert torch.equal(seen[key][..., row, :length], source[key][..., place, :]), key
                assert (seen[key][..., row, length:] == padding).all(), key


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "llava_next"])
def test_samples_of_one_picture_do_not_see_each_other(name):
    """Four pictures, one of them three times, over the batches; also where pixels are flat patches."""
    batches = [family_batch(name, seed) for seed in range(3)]
    for batch in batches:
        batch["labels"] = batch["input_ids"]
    pixels = [batch["pixel_values"] for batch in batches]
    half = len(pixels[0]) // 2
    pixels[1][:half] = pixels[2][half:] = pixels[0][:half]  # samples 0, 2 and 5
    for seed in range(6):
        exchange = _exchange(*batches, seed=seed, network=Network(build_family(name)))
        assert exchange.paired.all()
        assert not {0, 2, 5} & {int(exchange.text_of[i]) for i in (0, 2, 5)}


def test_pictures_that_are_a_samples_by_number_only_are_told_by_its_vision_tokens():
    """Two of the first sample, none of the second: as many pictures as samples."""
    mask = torch.tensor([[True] * 4, [False] * 4])
    batch = {"input_ids": torch.zeros(2, 4), "vision_mask": mask, "pixel_values": torch.randn(2, 3, 4, 4)}
    changed = batch["pixel_values"].clone()
    changed[1] += 1
    before, after = _pictures(batch), _pictures({**batch, "pixel_values": changed})
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_where_one_picture_is_of_most_samples_some_have_no_partner():
    batch = tiny_batch(batch=4)
    batch["pixel_values"][1:3] = batch["pixel_values"][0]
    with pytest.warns(
        ProbeWarning, match="2 of the probe's 4 labelled samples with pictures see no other picture"
    ):
        exchange = _exchange(batch)
    assert exchange.paired[3]
    assert exchange.paired.sum() == 2
    batch["pixel_values"][3] = batch["pixel_values"][0]
    with pytest.warns(ProbeWarning, match="the probe's pictures are all alike, so its image gain is 0"):
        exchange = _exchange(batch)
    assert exchange.paired.all()
    assert sorted(exchange.text_of.tolist()) == [0, 1, 2, 3]
    assert (exchange.text_of != torch.arange(4)).all()


def test_pictures_of_other_numbers_of_tokens_or_shapes_are_not_exchanged():
    small = tiny_batch(batch=2)
    fewer = tiny_batch(batch=2, patches=5)
    larger = tiny_batch(seed=1, batch=2)
    larger["pixel_values"] = torch.randn(2, 3, 16, 16)
    assert _exchange(small, fewer, larger).text_of.tolist() == [1, 0, 3, 2, 5, 4]
    lonely = {k: v[:1] for k, v in fewer.items()}
    with pytest.warns(ProbeWarning, match="1 of the probe's 3 labelled samples"):
        exchange = _exchange(small, lonely)
    assert exchange.text_of.tolist() == [1, 0, 2]
    assert exchange.paired.tolist() == [True, True, False]


def test_without_an_attention_mask_only_texts_of_one_length_are_exchanged():
    batches = [tiny_batch(seed=s, batch=2, after=after, padded=0) for s, after in enumerate((7, 4, 7))]
    with_mask = _exchange(*batches)
    for batch in batches:
        del batch["attention_mask"]
    exchange = _exchange(*batches)
    assert exchange.text_of[2:4].tolist() == [3, 2]
    assert exchange.text_of.tolist() != with_mask.text_of.tolist()


def test_samples_without_labels_or_picture_stay_as_they_are():
    batch = tiny_batch(batch=5)
    batch["labels"][1] = -100
    batch["input_ids"][3, batch["input_ids"][3] == IMAGE_TOKEN] = 9
    batch["pixel_values"] = batch["pixel_values"][[0, 1, 2, 4]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ProbeWarning)  # they could not count: nothing to warn of
        exchange = _exchange(batch)
    assert exchange.text_of[[1, 3]].tolist() == [1, 3]
    assert exchange.paired.tolist() == [True, False, True, False, True]


def _changed(**entries):
    return {**tiny_batch(batch=2), **entries}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (tiny_batch(labels=False), "the probe has no labelled token beside a picture: .*labels"),
        (_changed(labels=torch.full((2, 19), -100)), "the probe has no labelled token beside a picture"),
        (_changed(input_ids=torch.full((2, 19), 9)), "the probe has no picture: .* placeholders"),
        (tiny_batch(batch=1), "none of the probe's 1 labelled samples can see another's picture: .*two different"),
        ({k: v for k, v in tiny_batch().items() if k != "pixel_values"}, "none of the probe's 4 labelled samples"),
        (_changed(labels=torch.zeros(2, 5)), r"labels of batch 0 .* shape of input_ids, \[2, 19\], got \[2, 5\]"),
        (_changed(labels=[1, 2]), "labels of batch 0 of the probe must .* got list"),
        (_changed(source=["web"]), r"source of batch 0 of the probe must be a list of 2 names, got \['web'\]"),
        (_changed(source=[1, 2]), r"source of batch 0 of the probe must be a list of 2 names, got \[1, 2\]"),
        (
            _changed(
                vision_mask=torch.ones(2, 30, dtype=torch.bool), text_mask=torch.ones(2, 30, dtype=torch.bool)
            ),
            r"vision_mask of batch 0 .* got \[2, 30\]: the image gain exchanges texts by their positions",
        ),
    ],
)
def test_probes_that_do_not_do(batch, message):
    with pytest.raises(ValueError, match=message):
        _exchange(batch)
