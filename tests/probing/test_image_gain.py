import numpy as np
import pytest
import torch

from mir_lightning.probing import Probe, evaluate_image_gain, evaluate_mir
from mir_lightning.probing.exchange import Exchange
from mir_lightning.probing.image_gain import _blank
from mir_lightning.probing.network import Network, ProbeWarning
from tests.distributed import run_on_ranks
from tests.families import FAMILIES, IMAGE, build_family, family_batch
from tests.models import IMAGE_TOKEN, tiny_batch, tiny_llava


def _text(batch):
    return {key: value for key, value in batch.items() if value.shape == batch["input_ids"].shape}


def _family_probe(name):
    """Two batches of two, of other texts and another length."""
    batches = []
    for seed in (0, 1):
        batch = family_batch(name, seed)
        ids = batch["input_ids"]
        is_text = (ids != IMAGE) & (ids != 0)
        batch["input_ids"] = torch.where(is_text, 20 + (ids + 11 * seed) % 40, ids)
        batch["labels"] = batch["input_ids"].masked_fill(~is_text, -100)
        if name == "paligemma":  # as its processor says; without, all see all where nothing is padded
            batch["token_type_ids"] = (is_text.cumsum(dim=1) > 3).long()
        batches.append(
            {**batch, **{key: value[:, : ids.shape[1] - 2 * seed] for key, value in _text(batch).items()}}
        )
    return batches


def _loss(model, text, pictures):
    """Cross-entropy summed over a text's tokens, in a batch of one without padding, token by token."""
    valid = text["attention_mask"].bool()[0]
    trimmed = {key: value[:, valid] for key, value in text.items()}
    labels = trimmed.pop("labels")[0]
    with torch.no_grad():
        logits = model(**trimmed, **pictures).logits[0].double().log_softmax(dim=-1)
    return -sum(logits[i - 1, label].item() for i, label in enumerate(labels) if i and label != -100)


def _brute_force(model, batches, blank=lambda pixels: torch.where(pixels == 0, 0.0, 1e-6)):
    """Losses of every text with every picture, ``[N, N]``, and with blank ones, ``[N]``; one picture a sample."""
    texts, pictures = [], []
    for batch in batches:
        text, count = _text(batch), len(batch["labels"])
        for row in range(count):
            texts.append({key: value[row : row + 1] for key, value in text.items()})
            pictures.append({k: v.tensor_split(count)[row] for k, v in batch.items() if k not in text})
    losses = np.array([[_loss(model, text, picture) for picture in pictures] for text in texts])
    none = [{k: blank(v) if v.is_floating_point() else v for k, v in p.items()} for p in pictures]
    return losses, np.array([_loss(model, *pair) for pair in zip(texts, none, strict=True)])


def _assert_is_brute_force(model, batches, atol=2e-6, atol_blank=2e-6, **options):
    result = evaluate_image_gain(model, Probe(batches), **options)
    losses, blank = _brute_force(model.eval(), batches)
    texts = Exchange(Network(model), Probe(batches), 0).text_of.tolist()
    picture_of = [texts.index(text) for text in range(len(texts))]
    tokens = np.array([(row[1:] != -100).sum() for batch in batches for row in batch["labels"]])
    right, other = losses.diagonal(), losses[range(len(losses)), picture_of]
    for found, gains, error, wrong, tolerance in (
        (result.gain, result.samples, result.standard_error, other, atol),
        (result.gain_blank, result.samples_blank, result.standard_error_blank, blank, atol_blank),
    ):
        gain = (wrong - right).sum() / tokens.sum()
        residuals = wrong - right - gain * tokens
        n = len(tokens)
        assert found == pytest.approx(gain, abs=tolerance)
        assert error == pytest.approx(np.sqrt(n / (n - 1) * (residuals**2).sum()) / tokens.sum(), abs=tolerance)
        np.testing.assert_allclose(gains, (wrong - right) / tokens, atol=3 * tolerance)
    assert result.loss == pytest.approx(right.sum() / tokens.sum(), abs=1e-5)
    assert result.tokens == tokens.sum()
    return result


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_every_sample_by_itself_with_pictures_exchanged_by_hand(name):
    # Emu3 quantises its features, which of a picture of one colour are rounding errors.
    result = _assert_is_brute_force(
        build_family(name), _family_probe(name), atol_blank=0.02 if name == "emu3" else 2e-6
    )
    if name != "got_ocr2":  # whose tiny random encoder gives the same for any picture
        assert (result.samples != 0).all()
        assert (result.samples_blank != 0).all()


def _padded_left(batch):
    """The same texts at the end of their rows."""
    shifts = (batch["attention_mask"] == 0).sum(dim=1).tolist()
    return {
        key: torch.stack([row.roll(shift) for row, shift in zip(value, shifts, strict=True)])
        if value.ndim == 2
        else value
        for key, value in batch.items()
    }


@pytest.mark.parametrize("left", [False, True])
def test_batches_of_any_size_length_and_padding(left):
    batches = [tiny_batch(s, batch, after=after) for s, batch, after in ((0, 4, 7), (1, 1, 12), (2, 3, 5))]
    for batch in batches:
        batch["labels"][:, 0] = -100  # nothing precedes it but padding
    batches = [_padded_left(batch) for batch in batches] if left else batches
    result = _assert_is_brute_force(tiny_llava(), batches)
    assert result.fingerprint == Probe(batches).fingerprint
    assert not result.sources


def test_bfloat16():
    batches = [tiny_batch(), tiny_batch(seed=1)]
    model = tiny_llava(seed=3)
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    exact = evaluate_image_gain(model, batches)
    half = evaluate_image_gain(model.to(torch.bfloat16), batches)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = evaluate_image_gain(model.float(), batches)
    for found in (half, mixed):
        assert found.gain != exact.gain
        assert found.gain == pytest.approx(exact.gain, abs=0.005)
        assert found.gain_blank == pytest.approx(exact.gain_blank, abs=0.005)


@pytest.fixture(scope="module")
def trained():
    """A tiny LLaVA that has learned what to say to each of six pictures, and those."""
    model, batch = tiny_llava(), tiny_batch(batch=6, padded=0)
    batch["input_ids"][:, :2] = 5
    batch["labels"][:, :12] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval(), batch


def test_a_model_that_has_learned_to_look_gains_and_a_silent_projector_gains_nothing(trained):
    model, batch = trained
    result = _assert_is_brute_force(model, [batch], atol=1e-4, atol_blank=1e-4)
    assert result.gain > 1
    assert result.gain - 3 * result.standard_error > 0.5
    assert result.gain_blank - 3 * result.standard_error_blank > 0
    silent = tiny_llava()
    for parameter in silent.model.multi_modal_projector.parameters():
        torch.nn.init.zeros_(parameter)
    result = evaluate_image_gain(silent, [batch])
    assert (result.gain, result.gain_blank, result.standard_error, result.standard_error_blank) == (0, 0, 0, 0)


def test_only_samples_that_see_another_picture_count(trained):
    model, batch = trained
    whole = {**batch, "source": ["web", "web", "web", "web", "books", "web"]}
    lonely = tiny_batch(seed=9, batch=1, patches=5)
    unlabelled = {**tiny_batch(seed=8, batch=1), "labels": torch.full((1, 19), -100), "source": ["silent"]}
    model.register_forward_pre_hook(_same_number_of_patches, with_kwargs=True)
    with pytest.warns(ProbeWarning, match="1 of the probe's 7 labelled samples"):
        result = evaluate_image_gain(model, [lonely, whole, unlabelled])
    model._forward_pre_hooks.clear()
    model._forward_pre_hooks_with_kwargs.clear()
    alone = evaluate_image_gain(model, [batch])
    assert (
        result.samples.isnan().tolist() == result.samples_blank.isnan().tolist() == [True] + 6 * [False] + [True]
    )
    assert result.gain == pytest.approx(alone.gain, abs=1e-6)
    assert (result.tokens, result.loss) == (alone.tokens, pytest.approx(alone.loss, abs=1e-6))
    assert list(result.sources) == ["books", "web"]
    books, web = result.sources["books"], result.sources["web"]
    assert (books.samples, web.samples) == (1, 5)
    assert books.gain == result.samples[5].item()
    assert np.isnan(books.standard_error)
    assert web.gain == pytest.approx(result.samples[[1, 2, 3, 4, 6]].mean().item())  # texts of one length
    other = {**whole, "source": ["books", *whole["source"][1:]]}
    assert Probe([other]).fingerprint != Probe([whole]).fingerprint


def _same_number_of_patches(module, args, kwargs):
    """A picture of fewer tokens, for LLaVA: features are cut to the number of placeholders."""
    placeholders = int((kwargs["input_ids"][0] == IMAGE_TOKEN).sum())
    if placeholders < 10:
        kwargs["input_ids"] = torch.where(kwargs["input_ids"] == IMAGE_TOKEN, 5, kwargs["input_ids"])
        kwargs["pixel_values"] = None
    return args, kwargs


def test_sources_are_taken_out_for_mir_too():
    batch = tiny_batch()
    assert (
        evaluate_mir(tiny_llava(), [{**batch, "source": list("abcd")}]).mir
        == evaluate_mir(tiny_llava(), [batch]).mir
    )


def _spy(model):
    """Pixels of every forward, as the tower sees them."""
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["pixel_values"]).clone()),
        with_kwargs=True,
    )
    return seen


def test_blank_pictures_are_of_one_colour_and_padding_stays_padding():
    model, batch = tiny_llava(), tiny_batch(batch=3)
    batch["pixel_values"][:, :, :2] = 0
    seen = _spy(model)
    evaluate_image_gain(model, [batch])
    right, other, blank = seen
    assert torch.equal(right, batch["pixel_values"])
    assert torch.equal(other, batch["pixel_values"]), "the texts are exchanged, not the pictures"
    assert (blank[:, :, :2] == 0).all()
    assert (blank[:, :, 2:] == 1e-6).all()
    assert (_blank(torch.arange(4, dtype=torch.uint8)) == 128).all()


def _refuse_more_than(samples, seen):
    def check(module, arguments, options):
        seen.append(len(options["input_ids"]))
        if seen[-1] > samples:
            raise torch.OutOfMemoryError(f"a batch of {seen[-1]}")

    return check


def test_batches_are_halved_until_they_fit(trained):
    model, batch = trained
    batches = [{**batch, "source": list("ababab")}, tiny_batch(seed=5, after=9)]
    expected = evaluate_image_gain(model, batches)
    seen = []
    handle = model.register_forward_pre_hook(_refuse_more_than(1, seen), with_kwargs=True)
    halved = evaluate_image_gain(model, batches)
    handle.remove()
    assert seen[:3] == [6, 3, 2]
    assert seen[3:] == [1] * 30
    torch.testing.assert_close(halved.samples, expected.samples, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(halved.samples_blank, expected.samples_blank, rtol=1e-5, atol=1e-5)
    assert halved.sources["a"].gain == pytest.approx(expected.sources["a"].gain, rel=1e-5)
    handle = model.register_forward_pre_hook(_refuse_more_than(0, seen), with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError, match="a batch of 1"):
        evaluate_image_gain(model, batches)
    handle.remove()


def test_leaves_no_trace():
    model, probe = tiny_llava(dropout=0.5).train(), Probe([tiny_batch()])
    model.model.vision_tower.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    results = [evaluate_image_gain(model, probe) for _ in range(2)]
    assert results[0].gain == results[1].gain
    assert torch.equal(torch.get_rng_state(), rng)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


def test_no_logits_but_the_labelled_ones_become_float32_and_no_labels_are_given():
    model, seen = tiny_llava().to(torch.bfloat16), []
    model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    model.register_forward_hook(lambda m, a, out: seen.append(out.logits.dtype))
    evaluate_image_gain(model, [{**tiny_batch(), "source": list("abcd")}])
    assert seen == [{"input_ids", "attention_mask", "pixel_values", "use_cache"}, torch.bfloat16] * 3


def test_losses_that_are_not_finite_name_the_sample():
    model = tiny_llava()

    def break_third(module, args, out):
        out.logits[2] = torch.nan
        return out

    model.register_forward_hook(break_third)
    with pytest.raises(ValueError, match="the loss of sample 2 is NaN or inf: the model has diverged"):
        evaluate_image_gain(model, [tiny_batch()])


def test_logits_of_other_positions_are_refused():
    model = tiny_llava()
    model.register_forward_hook(lambda m, a, out: type(out)(logits=out.logits[:, 1:]))
    with pytest.raises(ValueError, match=r"LlavaFor\w+ gave logits \[4, 18, 64\] where \[B, S, V\] .* \[4, 19\]"):
        evaluate_image_gain(model, [tiny_batch()])
    model.register_forward_hook(lambda m, a, out: out.logits)
    with pytest.raises(ValueError, match=r"gave logits NoneType where"):
        evaluate_image_gain(model, [tiny_batch()])


def _three_batches():
    sources = iter("aabbbaababb")
    batches = [tiny_batch(s, size, after=after) for s, size, after in ((0, 4, 7), (1, 2, 9), (2, 5, 7))]
    return [{**batch, "source": [next(sources) for _ in batch["labels"]]} for batch in batches]


def _on_rank(rank, world):
    """Three batches for two ranks: the first of them is run by both, and counted once."""
    model = tiny_llava()
    result = evaluate_image_gain(model, _three_batches(), distributed=True)
    error = None
    if rank:
        model.lm_head.weight.data.fill_(torch.nan)
    try:
        evaluate_image_gain(model, _three_batches(), distributed=True)
    except Exception as caught:
        error = str(caught)
    return {**vars(result), "sources": {k: tuple(v) for k, v in result.sources.items()}, "error": error}


def test_ranks_see_the_samples_of_all():
    alone = evaluate_image_gain(tiny_llava(), _three_batches())
    for rank, found in enumerate(run_on_ranks(_on_rank, 2)):
        for name in (
            "gain",
            "gain_blank",
            "standard_error",
            "standard_error_blank",
            "loss",
            "tokens",
            "fingerprint",
        ):
            expected = getattr(alone, name)
            assert found[name] == (expected if isinstance(expected, str) else pytest.approx(expected, abs=1e-6)), (
                name
            )
        torch.testing.assert_close(found["samples"], alone.samples, rtol=0, atol=1e-5)
        torch.testing.assert_close(found["samples_blank"], alone.samples_blank, rtol=0, atol=1e-5)
        assert found["sources"]["a"] == pytest.approx(alone.sources["a"], abs=1e-6)
        assert found["error"].startswith(
            "the loss of sample 4 is NaN" if rank else "on rank 1: the loss of sample 4"
        )
