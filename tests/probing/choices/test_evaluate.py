from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers

from mir_lightning.functional import soft_discrimination_score
from mir_lightning.probing import ChoiceProbe, evaluate_choices
from mir_lightning.probing.choices.items import open_image
from mir_lightning.probing.choices.probe import made_of
from tests.items import QWEN_IMAGE, hard_items, item, picture
from tests.processors import FAMILIES, build, tokenizer


def reference(model, processor, asked, score, image_text=None):
    """Scores of an item's candidates, one full forward each, the candidate's tokens counted from the end."""
    prompt = asked.prompt if "<image>" in asked.prompt else "<image>\n" * len(asked.images) + asked.prompt
    prompt = prompt.replace("<image>", image_text or processor.image_token)
    found = []
    for candidate in (asked.answer, *asked.distractors):
        ending = candidate if prompt[-1].isspace() else " " + candidate
        pictures = {"images": [[open_image(i) for i in asked.images]]} if asked.images else {}
        inputs = processor(text=[prompt + ending], **pictures, return_tensors="pt")
        ids = inputs["input_ids"][0]
        start = len(ids) - 1
        while len(processor.tokenizer.decode(ids[start:])) < len(ending):
            start -= 1
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0].double()
        if score == "logprob":
            logits = logits.log_softmax(dim=-1)
        found.append(np.mean([logits[t - 1, ids[t]].item() for t in range(start, len(ids))]))
    return found


@pytest.mark.parametrize("score", ["logit", "logprob"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_scores_as_one_full_forward_a_candidate(family, score):
    model, processor = build(family)
    items = hard_items()
    mark = QWEN_IMAGE if "qwen" in family else processor.image_token
    expected = [reference(model, processor, asked, score, mark) for asked in items]
    for side, batch_size in (("left", 100), ("right", 100), ("right", 5), ("left", 1)):
        processor.tokenizer.padding_side = side
        result = evaluate_choices(model, ChoiceProbe(items, processor, image_text=mark), score, batch_size)
        assert result.shared_prefix
        for asked, found, wanted in zip(items, result.scores, expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0, err_msg=asked.id)
    wanted = [torch.tensor(scores) for scores in expected]
    assert result.sds == pytest.approx(soft_discrimination_score(wanted).item(), abs=1e-4)
    assert result.accuracy == np.mean([np.argmax(scores) == 0 for scores in expected])
    assert result.chance == pytest.approx(np.mean([1 / len(scores) for scores in expected]))
    assert result.breakdown["reasoning/relation"].sds == pytest.approx(
        soft_discrimination_score(wanted[-1:]).item(), abs=1e-4
    )


def test_boundaries_that_merge_are_not_shared():
    _, processor = build("llava")
    probe = ChoiceProbe(hard_items(), processor)
    encoded = probe.encode([i for i in probe.items if i.id in ("one", "merged")])
    assert encoded.shared()[0] == len(encoded.prompts[0])
    assert encoded.shared()[1] == len(encoded.prompts[1]) - 1  # the space becomes part of the answer's token
    first = encoded.candidates[1][0]
    assert processor.tokenizer.decode(first.ids[first.start :]) == " red circles"


def test_a_tokenizer_that_does_not_survive_decoding():
    model, processor = build("llava")
    expected = evaluate_choices(model, ChoiceProbe(hard_items(), processor))
    tokenizer.cache_clear()  # its decoder is taken away
    model, processor = build("llava")
    processor.tokenizer.backend_tokenizer.decoder = None
    probe = ChoiceProbe(hard_items(), processor)
    assert probe._continue(probe.encode(probe.items[:1]).prompts[0], [" red"]) is None
    found = evaluate_choices(model, probe)
    tokenizer.cache_clear()
    for a, b in zip(found.scores, expected.scores, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


class Count:
    """What a module is called with."""

    def __init__(self, module):
        self.rows, self.widths = [], []
        self.handle = module.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module, arguments, options):
        given = next(v for v in (*arguments, *options.values()) if isinstance(v, torch.Tensor))
        self.rows.append(given.shape[0])
        self.widths.append(given.shape[1])


def test_images_run_once_an_item_and_one_token_candidates_need_no_second_forward():
    model, processor = build("llava")
    items = [item(f"{i}", "<image>The star is", "red", "the", "star", images=[picture(i)]) for i in range(6)]
    probe = ChoiceProbe(items, processor)
    vision, whole = Count(model.model.vision_tower), Count(model)
    evaluate_choices(model, probe, batch_size=6)
    checked = 2 + 2  # two items of one candidate, shared and whole
    assert sum(vision.rows) == checked + 6
    assert whole.rows == [2, 2, 2, 2, 2]
    longer = ChoiceProbe(
        [*items, item("x", "<image>The star is", "red", "light green", images=[picture(9)])], processor
    )
    whole.rows.clear()
    evaluate_choices(model, longer, batch_size=100)
    assert whole.rows == [2, 2, 2, 7, 20]  # now the check and the items have tokens to continue with


def _hybrid(monkeypatch):
    """LLaVA on an LLM whose layers alternate short convolutions and attention."""
    text = transformers.Lfm2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=400,
        layer_types=["conv", "full_attention", "conv"],
        pad_token_id=0,
    )
    monkeypatch.setattr(transformers, "LlamaConfig", lambda **_: text)
    return build("llava")


def test_where_the_cache_cannot_be_shared_candidates_run_whole(monkeypatch):
    model, processor = _hybrid(monkeypatch)
    items = hard_items()
    result = evaluate_choices(model, ChoiceProbe(items, processor), batch_size=6)
    assert not result.shared_prefix
    for asked, found in zip(items, result.scores, strict=True):
        np.testing.assert_allclose(found, reference(model, processor, asked, "logit"), atol=1e-4, err_msg=asked.id)


def test_a_prompt_that_sees_ahead_does_not_see_the_answer():
    """PaliGemma, against its own generation: the prompt, then one token of the candidate at a time."""
    model, processor = build("paligemma")
    items = [
        item("a", "What colour?", "red", "light green", images=[picture(0)]),
        item("b", "Is the star small? Answer:", "to the left of it", "large", images=[picture(1)]),
    ]
    result = evaluate_choices(model, ChoiceProbe(items, processor))
    assert result.shared_prefix
    for asked, found in zip(items, result.scores, strict=True):
        inputs = processor(text=["<image>\n" + asked.prompt], images=[[asked.images[0]]], return_tensors="pt")
        inputs.pop("labels", None)
        for candidate, score in zip(asked.candidates, found, strict=True):
            ids = processor.tokenizer(" " + candidate, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                output = model(**inputs, use_cache=True)
                steps = [output.logits[0, -1, ids[0]].item()]
                for token, following in pairwise(ids):
                    output = model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values)
                    steps.append(output.logits[0, -1, following].item())
            assert score == pytest.approx(np.mean(steps), abs=1e-4)


def test_a_cache_that_answers_wrongly_is_not_shared():
    model, processor = build("llava")
    probe = ChoiceProbe(hard_items(), processor)
    expected = evaluate_choices(model, probe)

    def shift(module, arguments, options):
        if (cache := options.get("past_key_values")) is not None and cache.get_seq_length():
            options["position_ids"] = torch.zeros_like(options["input_ids"])
        return arguments, options

    model.register_forward_pre_hook(shift, with_kwargs=True)
    found = evaluate_choices(model, probe)
    assert expected.shared_prefix
    assert not found.shared_prefix
    for a, b in zip(found.scores, expected.scores, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


def test_template_image_text_and_order():
    model, processor = build("qwen2_vl")
    asked = item("a", "What colour?", "red", "green", images=[picture(0)])
    probe = ChoiceProbe([asked], processor, "Question: {prompt} Short answer:", image_text=QWEN_IMAGE)
    whole = item("a", "Question: <image>\nWhat colour? Short answer:", "red", "green", images=[picture(0)])
    expected = reference(model, processor, whole, "logit", QWEN_IMAGE)
    np.testing.assert_allclose(evaluate_choices(model, probe).scores[0], expected, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_leaves_no_trace(family):
    model, processor = build(family)
    probe = ChoiceProbe(hard_items(), processor, image_text=QWEN_IMAGE if family == "qwen2_vl" else None)
    evaluate_choices(model, probe)
    model.train()
    model.model.visual.eval() if family == "qwen2_vl" else model.model.vision_tower.eval()
    before = {
        name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), getattr(m, "rope_deltas", None))
        for name, m in model.named_modules()
    }
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    evaluate_choices(model, probe)
    handle = model.get_decoder().layers[1].register_forward_pre_hook(_raise)
    with pytest.raises(RuntimeError, match="in the middle"):
        evaluate_choices(model, probe)
    handle.remove()
    for name, m in model.named_modules():
        after = (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), getattr(m, "rope_deltas", None))
        assert after == before[name], name
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()


def _raise(module, arguments):
    raise RuntimeError("in the middle")


def test_batches_are_halved_until_they_fit():
    model, processor = build("llava")
    probe = ChoiceProbe(hard_items(), processor)
    expected = evaluate_choices(model, probe)

    def refuse(limit):
        def check(module, arguments, options):
            if len(options["input_ids"]) > limit:
                raise torch.OutOfMemoryError(f"a batch of {len(options['input_ids'])}")

        return model.register_forward_pre_hook(check, with_kwargs=True)

    handle = refuse(5)
    found = evaluate_choices(model, probe, batch_size=40)
    handle.remove()
    for a, b in zip(found.scores, expected.scores, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
    refuse(1)
    with pytest.raises(torch.OutOfMemoryError, match="a batch of"):
        evaluate_choices(model, probe)


def test_bfloat16_and_compiled_models():
    model, processor = build("llava")
    probe = ChoiceProbe(hard_items(), processor)
    expected = evaluate_choices(model, probe)
    assert evaluate_choices(torch.compile(model, backend="eager"), probe).sds == pytest.approx(
        expected.sds, rel=1e-6
    )
    with torch.autocast("cpu", torch.bfloat16):
        mixed = evaluate_choices(model, probe)
    half = evaluate_choices(model.to(torch.bfloat16), probe)
    for result in (mixed, half):
        assert result.shared_prefix
        assert result.sds == pytest.approx(expected.sds, abs=0.05)
        assert result.sds != expected.sds


def test_fingerprint_tells_contents_apart(tmp_path):
    _, processor = build("llava")
    picture(0).save(tmp_path / "a.png")
    base = item("a", "What?", "red", "green", images=[tmp_path / "a.png"])
    prints = [
        ChoiceProbe([asked], processor, template).fingerprint
        for asked, template in (
            (base, "{prompt}"),
            (base, "{prompt}"),
            (base, "Q {prompt}"),
            (item("a", "What?", "green", "red", images=[tmp_path / "a.png"]), "{prompt}"),
            (item("a", "What?", "red", "green", images=[picture(0)]), "{prompt}"),
            (item("a", "What?", "red", "green", images=[picture(1)]), "{prompt}"),
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 5


def test_scores_that_are_not_finite_name_the_item():
    model, processor = build("llava")
    probe = ChoiceProbe(hard_items(), processor)
    with torch.no_grad():
        model.lm_head.weight[:] = torch.nan
    with pytest.raises(ValueError, match="scores of item one hold NaN or inf: the model has diverged"):
        evaluate_choices(model, probe)


def test_bad_arguments():
    model, processor = build("llava")
    items = hard_items()
    probe = ChoiceProbe(items, processor)
    with pytest.raises(ValueError, match="score must be one of logit, logprob, got 'loss'"):
        evaluate_choices(model, probe, score="loss")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate_choices(model, probe, batch_size=0)
    with pytest.raises(TypeError, match="items must be a ChoiceProbe, got list"):
        evaluate_choices(model, items)
    with pytest.raises(TypeError, match="items must be a ChoiceProbe or a callable that makes one, got list"):
        made_of(ChoiceProbe, items)
    assert made_of(ChoiceProbe, lambda: probe) is made_of(ChoiceProbe, probe) is probe
    t5 = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=400)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        evaluate_choices(transformers.T5ForConditionalGeneration(t5), probe)
    with pytest.raises(ValueError, match=r"template must hold \{prompt\}, got 'Question:'"):
        ChoiceProbe(items, processor, "Question:")
    with pytest.raises(ValueError, match="processor must have a tokenizer, got object"):
        ChoiceProbe(items, object())
    processor.image_token = None
    with pytest.raises(ValueError, match="LlavaProcessor has no image_token: say with image_text"):
        ChoiceProbe(items, processor)
    processor.tokenizer.pad_token = None
    try:
        with pytest.raises(ValueError, match="has no pad token"):
            ChoiceProbe(items, processor, image_text="<image>")
    finally:
        tokenizer.cache_clear()
