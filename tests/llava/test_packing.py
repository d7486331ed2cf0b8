from functools import cache

import pytest
import torch
from PIL import Image

from mir_lightning.llava.costs import training_flops
from mir_lightning.llava.data.batches import ConversationCollator
from mir_lightning.llava.data.mixture import source_losses
from mir_lightning.llava.data.packing import pack, sample_numbers, samples_of
from mir_lightning.llava.data.prompts import PlainPrompt
from mir_lightning.llava.data.source import Sample
from mir_lightning.llava.model.module import model_inputs
from mir_lightning.vlm import token_masks
from tests import processors

LENGTH = 40


@cache
def _samples():
    """Captions, documents of two pictures, texts alone; of different lengths, in pictures of different colours."""

    def picture(number):
        return Image.effect_noise((16, 16), 20 + 10 * number).convert("RGB")

    captions = [
        Sample((picture(i),), ("<image>", "The star is red. " * (i + 1)), source="captions") for i in range(4)
    ]
    document = "How many?\n<image>\ntwo small red circles\n<image>\nabove"
    documents = [Sample((picture(5), picture(6)), (document,), source="interleaved")]
    texts = [Sample((), ("Is the square small or large? " * n,), source="text") for n in (1, 2)]
    return [texts[0], *captions, *documents, texts[1]]


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    return processors.llava()


def _batches(processor, samples=None):
    collate = ConversationCollator(processor, PlainPrompt(), LENGTH)
    packing = ConversationCollator(processor, PlainPrompt(), LENGTH, pack=True)
    return collate(samples or _samples()), packing(samples or _samples())


def test_rows_hold_whole_samples_and_are_full():
    rows = [
        {"input_ids": [i] * n, "labels": [i] * n, "attention_mask": [1] * n} for i, n in enumerate((5, 9, 3, 7, 2))
    ]
    packed, order = pack(rows, 10)
    assert [row["input_ids"] for row in packed] == [[1] * 9, [3] * 7 + [2] * 3, [0] * 5 + [4] * 2]
    assert order == [1, 3, 2, 0, 4]
    assert packed[1]["position_ids"] == [*range(7), *range(3)]
    assert packed[1]["labels"] == [-100] + [3] * 6 + [-100] + [2] * 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("flash", [False, True])
def test_loss_and_gradients_are_those_of_samples_alone(parts, attention, flash):
    model, processor = parts
    model.set_attn_implementation(attention)
    plain, packed = _batches(processor)
    assert packed["input_ids"].shape == (4, LENGTH)
    assert len(plain["input_ids"]) == 7
    found = []
    for batch in (plain, packed):
        model.zero_grad()
        inputs = model_inputs(batch, flash and batch is packed)  # as one row, in which flash attention takes it
        assert ("attention_mask" in inputs) == (batch is plain)
        model(**inputs, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        found[-1]["loss"] = model(**inputs, use_cache=False).loss.detach()
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(
            found[1][name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def _attend(query, key, value, softmax_scale=None, causal=False):
    """Attention by its definition, of ``[tokens, heads, width]``."""
    key, value = (side.repeat_interleave(query.shape[1] // side.shape[1], dim=1) for side in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (softmax_scale or query.shape[-1] ** -0.5)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


def test_flash_attention_gets_the_samples_of_a_packed_row_apart(parts, monkeypatch):
    """All of transformers' way to flash attention, with kernels from the definition: the real ones need a GPU."""
    model, processor = parts
    plain, packed = _batches(processor)
    model.set_attn_implementation("sdpa")
    expected = [model(**model_inputs(plain, flash=False), use_cache=False).loss]
    expected += torch.autograd.grad(expected[0], list(model.model.language_model.parameters()))
    lengths = []

    def whole(q, k, v, softmax_scale=None, causal=False):
        return torch.stack([_attend(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)])

    def by_sample(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
    ):
        assert causal
        assert cu_seqlens_q.equal(cu_seqlens_k)
        lengths.append(cu_seqlens_q.diff().tolist())
        parts = zip(*(side.split(lengths[-1]) for side in (q, k, v)), strict=True)
        return torch.cat([_attend(*part, softmax_scale, causal) for part in parts])

    flash = "transformers.modeling_flash_attention_utils."
    for name in ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(flash + name, None)
    for name in ("_loaded_implementation", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(flash + name, None)
    monkeypatch.setattr(flash + "_lazy_imports", lambda *_, **__: (whole, by_sample, None, None, None))
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")

    found = [model(**model_inputs(packed, flash=True), use_cache=False).loss]
    found += torch.autograd.grad(found[0], list(model.model.language_model.parameters()))
    numbers, runs = sample_numbers(packed).flatten().unique_consecutive(return_counts=True)
    assert len(lengths) == model.config.text_config.num_hidden_layers
    for of_layer in lengths:  # padding is attended to by padding alone, however that is cut
        apart = numbers.repeat_interleave(runs).split(of_layer)
        assert [len(part) for part in apart if part[0] >= 0] == runs[numbers >= 0].tolist()
        assert all((part == part[0]).all() for part in apart)
    for value, same in zip(found, expected, strict=True):
        torch.testing.assert_close(value, same, rtol=1e-5, atol=1e-6)


def test_attention_that_crossed_samples_would_be_seen(parts):
    model, processor = parts
    model.set_attn_implementation("sdpa")
    plain, packed = _batches(processor)
    inputs = model_inputs(packed, flash=False)
    expected = model(**model_inputs(plain, flash=False)).loss
    inputs["position_ids"] = torch.arange(LENGTH).expand_as(inputs["position_ids"])
    assert abs(model(**inputs).loss - expected) > 1e-4


def test_sources_follow_their_samples(parts):
    model, processor = parts
    names = ["captions", "interleaved", "text"]
    plain, packed = _batches(processor)
    assert packed["source"] != plain["source"]
    for batch in (plain, packed):
        assert samples_of(batch) == 7
        inputs = model_inputs(batch, flash=False)
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
        found = source_losses(batch, logits, names)
        for name, (loss, tokens) in zip(names, found.tolist(), strict=True):
            alone, _ = _batches(processor, [sample for sample in _samples() if sample.source == name])
            inputs = model_inputs(alone, flash=False)
            assert tokens == (alone["labels"][:, 1:] != -100).sum()
            with torch.no_grad():
                assert loss / tokens == pytest.approx(model(**inputs).loss.item(), rel=1e-5)


def test_positions_tell_samples_and_padding_apart(parts):
    _, processor = parts
    _, packed = _batches(processor)
    numbers = sample_numbers(packed)
    assert (numbers == -1).equal(packed["attention_mask"] == 0)
    assert numbers.unique().tolist() == [-1, *range(7)]


def test_the_same_operations_but_for_padding(parts):
    model, processor = parts
    of_batch = training_flops(model)
    plain, packed = (
        of_batch(batch, token_masks(model.config, batch, "all").vision) for batch in _batches(processor)
    )
    assert packed == pytest.approx(plain, rel=1e-12)


def test_a_text_alone_brings_a_blank_picture(parts):
    model, processor = parts
    _, packed = _batches(processor, [_samples()[0]])
    assert packed["source"] == ["text", ""]
    assert len(packed["pixel_values"]) == 1
    assert model(**model_inputs(packed, flash=False)).loss.isfinite()


def test_what_cannot_be_packed_or_does_not_fit(parts, tiny_processor):
    _, processor = parts
    with pytest.raises(ValueError, match=r"max_length=5 would cut|max_length=5 leaves nothing"):
        ConversationCollator(processor, PlainPrompt(), 5).check()
    ConversationCollator(processor, PlainPrompt(), 12, pack=True).check()
    _, qwen = processors.qwen2_vl()
    ConversationCollator(qwen, PlainPrompt()).check()
    with pytest.raises(ValueError, match=r"pack: (tokens of this model have|image_grid_thw|pixel_values)"):
        ConversationCollator(qwen, PlainPrompt(), pack=True).check()
