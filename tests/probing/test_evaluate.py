import gc
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from accelerate import cpu_offload
from lightning.fabric import Fabric

from mir_lightning.functional import mir_influence, modality_integration_rate, standard_error
from mir_lightning.probing import Probe, evaluate_mir
from mir_lightning.probing.batches import MaskedBatches
from mir_lightning.probing.network import ProbeWarning
from mir_lightning.vlm import TokenMasks
from tests import oracle
from tests.distributed import run_on_ranks
from tests.faults import batches
from tests.models import IMAGE_TOKEN, tiny_batch, tiny_llava


def _reference_tokens(model, probe, text="after_vision"):
    """Vision and text tokens by layer, from ``output_hidden_states``, position by position."""
    vision, text_tokens = [], []
    for batch in probe:
        ids, valid = batch["input_ids"], batch["attention_mask"].bool()
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states[1:]
        is_vision = torch.zeros_like(valid)
        is_text = torch.zeros_like(valid)
        for row in range(len(ids)):
            first = next((i for i, token in enumerate(ids[row]) if token == IMAGE_TOKEN), -1)
            for i, token in enumerate(ids[row]):
                if token == IMAGE_TOKEN:
                    is_vision[row, i] = True
                elif valid[row, i] and (text == "all" or i > first):
                    is_text[row, i] = True
        vision.append([s[is_vision] for s in states])
        text_tokens.append([s[is_text] for s in states])
    return [[torch.cat(layer) for layer in zip(*batches, strict=True)] for batches in (vision, text_tokens)]


@pytest.fixture
def probe():
    return Probe([tiny_batch(seed=s) for s in range(3)])


@pytest.mark.parametrize("variant", ["paper", "robust", "official"])
@pytest.mark.parametrize("text", ["after_vision", "all"])
def test_equals_the_functional_on_output_hidden_states(probe, variant, text):
    model = tiny_llava().eval()
    vision, text_tokens = _reference_tokens(model, probe, text)
    mir, layers = modality_integration_rate(vision, text_tokens, variant, return_layers=True)
    result = evaluate_mir(model, probe, variant, text)
    np.testing.assert_allclose(result.layers, layers, rtol=1e-6)
    assert result.mir == pytest.approx(mir.item(), rel=1e-6)
    assert result.vision_tokens == len(vision[0]) == 3 * 4 * 10
    assert result.text_tokens == len(text_tokens[0])
    torch.testing.assert_close(result.mean_gap + result.cov_gap, result.layers, rtol=0, atol=0)
    assert result.effective_rank.shape == result.outliers.shape == (3, 2)
    robust, robust_layers = modality_integration_rate(vision, text_tokens, "robust", return_layers=True)
    assert result.mir_robust == pytest.approx(robust.item(), rel=1e-6)
    np.testing.assert_allclose(result.robust_layers, robust_layers, rtol=1e-6)
    for layer, tokens in zip(result.massive.tolist(), zip(vision, text_tokens, strict=True), strict=True):
        assert layer == [oracle.outliers(x.double().numpy(), "robust").sum() for x in tokens]


def test_batching_of_the_probe_does_not_matter():
    model = tiny_llava()
    whole = tiny_batch(batch=6, padded=0)
    singles = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(6)]
    a, b = evaluate_mir(model, Probe([whole])), evaluate_mir(model, Probe(singles))
    np.testing.assert_allclose(a.layers, b.layers, rtol=1e-5)
    assert a.loss == pytest.approx(b.loss, rel=1e-6)


def test_loss_is_the_mean_over_all_labelled_tokens(probe):
    model = tiny_llava().eval()
    total, count = 0.0, 0
    for batch in probe:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.detach().double()
        for row, labels in zip(logits.log_softmax(-1), batch["labels"], strict=True):
            for position in range(1, len(labels)):
                if labels[position] != -100:
                    total -= row[position - 1, labels[position]].item()
                    count += 1
    result = evaluate_mir(model, probe)
    assert result.loss == pytest.approx(total / count, rel=1e-6)
    assert result.perplexity == pytest.approx(np.exp(total / count), rel=1e-6)
    assert evaluate_mir(model, Probe([tiny_batch(labels=False)])).loss is None


def test_masks_in_the_batch_win():
    model = tiny_llava().eval()
    batch = tiny_batch()
    found = evaluate_mir(model, Probe([batch]))
    vision_mask = batch["input_ids"] == IMAGE_TOKEN
    text_mask = torch.zeros_like(vision_mask)
    text_mask[:, 12:] = True
    given = evaluate_mir(model, Probe([{**batch, "vision_mask": vision_mask, "text_mask": text_mask}]), text="all")
    assert given.layers.tolist() == found.layers.tolist()
    vision_mask[:, 2:7] = False
    assert evaluate_mir(model, Probe([{**batch, "vision_mask": vision_mask}])).mir != found.mir


def test_no_more_than_two_layers_are_alive():
    """Count the [B, S, H] tensors of decoder width alive after each layer."""
    model = tiny_llava(layers=8)
    batch = tiny_batch(batch=5, before=3, after=16)
    shape, alive = (5, 29, 24), []

    def count(*_):
        gc.collect()
        storages = {
            t.untyped_storage().data_ptr()
            for t in gc.get_objects()
            if type(t) is torch.Tensor and t.shape == shape
        }
        alive.append(len(storages))

    handles = [layer.register_forward_hook(count) for layer in model.model.language_model.layers]
    evaluate_mir(model, Probe([batch]))
    [h.remove() for h in handles]
    assert len(alive) == 8
    assert max(alive[1:]) <= alive[0] + 1, "memory grows with the depth"
    assert max(alive) <= 3  # the embeddings, and two layers


def test_leaves_no_trace(probe):
    model = tiny_llava(dropout=0.5).train()
    model.model.vision_tower.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = _hooks_after_a_forward(model)
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    evaluate_mir(model, probe)
    assert torch.equal(torch.get_rng_state(), rng)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert {name: list(m._forward_hooks) for name, m in model.named_modules()} == hooks
    assert torch.is_grad_enabled()


def _hooks_after_a_forward(model):
    """transformers leaves hooks of its own on a model's first forward."""
    model(**tiny_batch())
    return {name: list(m._forward_hooks) for name, m in model.named_modules()}


def test_a_model_whose_weights_are_kept_off_the_device(probe):
    expected = evaluate_mir(tiny_llava().eval(), probe)
    model = tiny_llava().eval()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    found = evaluate_mir(model, probe)
    assert (found.mir, found.loss) == (expected.mir, expected.loss)
    assert next(model.parameters()).device.type == "meta"


def test_an_error_inside_leaves_no_trace_either(probe):
    model = tiny_llava().train()
    hooks = _hooks_after_a_forward(model)
    handle = model.model.language_model.layers[1].register_forward_hook(
        lambda _m, _a, out: torch.full_like(out, torch.nan)
    )
    rng = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"vision hidden states of layer 1 hold NaN or inf \(40 of 40 tokens\)"):
        evaluate_mir(model, probe)
    handle.remove()
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(m.training for m in model.modules())
    assert {name: list(m._forward_hooks) for name, m in model.named_modules()} == hooks
    assert torch.is_grad_enabled()


def test_bfloat16_model_and_autocast(probe):
    reference = evaluate_mir(tiny_llava(), probe)
    half = evaluate_mir(tiny_llava().to(torch.bfloat16), probe)
    assert half.mir == pytest.approx(reference.mir, abs=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = evaluate_mir(tiny_llava(), probe)
    assert mixed.mir == pytest.approx(reference.mir, abs=0.02)
    assert mixed.mir != reference.mir


def test_compiled_model_is_seen():
    model = tiny_llava().eval()
    probe = Probe([tiny_batch(labels=False)])
    expected = evaluate_mir(model, probe).mir
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**tiny_batch(labels=False))
    assert evaluate_mir(compiled, probe).mir == pytest.approx(expected, rel=1e-6)


def test_probe_without_vision_tokens():
    batch = tiny_batch()
    batch["input_ids"][batch["input_ids"] == IMAGE_TOKEN] = 5
    with pytest.raises(ValueError, match="the probe has 0 vision tokens and needs at least 2: is the image"):
        evaluate_mir(tiny_llava(), Probe([batch]))


def test_probe_without_text_tokens():
    with pytest.raises(ValueError, match=r'the probe has 0 text tokens .* text="all"'):
        evaluate_mir(tiny_llava(), Probe([tiny_batch(after=0, padded=0)]))


@pytest.mark.parametrize("name", ["vision_mask", "text_mask"])
def test_masks_of_the_wrong_shape_or_type(name):
    batch = tiny_batch()
    with pytest.raises(ValueError, match=rf"{name} must have the shape of input_ids, \[4, 19\], got \[4, 3\]"):
        evaluate_mir(tiny_llava(), Probe([{**batch, name: torch.ones(4, 3, dtype=torch.bool)}]))
    with pytest.raises(ValueError, match=rf"{name} must be a boolean tensor, got torch.int64"):
        evaluate_mir(tiny_llava(), Probe([{**batch, name: batch["input_ids"]}]))


def test_unknown_options():
    with pytest.raises(ValueError, match="variant must be one of"):
        evaluate_mir(tiny_llava(), Probe([tiny_batch()]), variant="exact")
    with pytest.raises(ValueError, match="text must be one of after_vision, all, got 'caption'"):
        evaluate_mir(tiny_llava(), Probe([tiny_batch()]), text="caption")


def _refuse_more_than(samples):
    def check(module, arguments, options):
        if len(options["input_ids"]) > samples:
            raise torch.OutOfMemoryError(f"a batch of {len(options['input_ids'])}")

    return check


def test_batches_are_halved_until_they_fit(probe):
    model = tiny_llava().train()
    expected = evaluate_mir(model, probe)
    handle = model.register_forward_pre_hook(_refuse_more_than(1), with_kwargs=True)
    halved = evaluate_mir(model, probe)
    handle.remove()
    np.testing.assert_allclose(halved.layers, expected.layers, rtol=1e-5)
    assert halved.loss == pytest.approx(expected.loss, rel=1e-6)
    assert (halved.text_tokens, halved.fingerprint) == (expected.text_tokens, expected.fingerprint)
    model.register_forward_pre_hook(_refuse_more_than(0), with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError, match="a batch of 1"):
        evaluate_mir(model, probe)


@pytest.mark.parametrize("variant", ["paper", "robust"])
def test_influence_of_each_sample(probe, variant):
    """As the functional's on ``output_hidden_states``; the same in halves of the batches."""
    model = tiny_llava().eval()
    tokens = _reference_tokens(model, probe)
    samples = [
        torch.cat([mask.nonzero()[:, 0] + 4 * index for index, mask in enumerate(masks)])
        for masks in zip(*(_token_positions(batch) for batch in probe), strict=True)
    ]
    expected = mir_influence(*tokens, *samples, variant)
    result = evaluate_mir(model, probe, variant, interval=True)
    assert result.influence.shape == (12,)
    np.testing.assert_allclose(result.influence, expected, rtol=1e-5, atol=1e-6)
    assert result.standard_error == pytest.approx(standard_error(expected).item(), rel=1e-5)
    model.register_forward_pre_hook(_refuse_more_than(1), with_kwargs=True)
    halved = evaluate_mir(model, probe, variant, interval=True)
    np.testing.assert_allclose(halved.influence, expected, rtol=1e-4, atol=1e-5)


def test_intervals_cover_redrawn_probes_from_kept_states():
    """200 probes of 80 samples, drawn from the states of 800: intervals hold the mean of all 95 % of the time."""
    probe = Probe(batches(50, seed=0))
    vision, text = _reference_tokens(tiny_llava().eval(), probe)
    vision, text = ([layer.view(800, -1, 24) for layer in side] for side in (vision, text))
    of_vision, of_text = (torch.arange(80).repeat_interleave(side[0].shape[1]) for side in (vision, text))
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(200):
        drawn = torch.randint(800, (80,), generator=generator)
        sides = [[layer[drawn].flatten(0, 1) for layer in side] for side in (vision, text)]
        error = standard_error(mir_influence(*sides, of_vision, of_text))
        found.append((modality_integration_rate(*sides).item(), error.item()))
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.15)
    assert 0.9 <= (np.abs(values - values.mean()) <= 1.96 * errors).mean() <= 0.985


def _token_positions(batch):
    vision = batch["input_ids"] == IMAGE_TOKEN
    return vision, batch["attention_mask"].bool() & ~vision & (vision.cumsum(1) > 0)


def _influence_on(rank, world):
    probe = Probe([tiny_batch(seed=s) for s in range(3)])  # ranks get two and one
    result = evaluate_mir(tiny_llava().eval(), probe, interval=True, distributed=world > 1)
    return result.influence, result.standard_error


def test_mir_by_source_is_that_of_its_batches_alone(probe):
    model = tiny_llava().eval()
    names = ["pages", "captions", "pages"]
    text = tiny_batch(seed=7)
    text["input_ids"][text["input_ids"] == IMAGE_TOKEN] = 5
    del text["pixel_values"]
    named = [{**batch, "source": [name] * 4} for batch, name in zip(probe, names, strict=True)]
    result = evaluate_mir(model, [*named, {**text, "source": ["text"] * 4}], interval=True, check=True)
    assert result.sources.keys() == {"captions", "pages"}  # text alone has no vision tokens
    for name, found in result.sources.items():
        alone = evaluate_mir(model, [batch for batch, own in zip(probe, names, strict=True) if own == name])
        assert found == (alone.mir, alone.loss)
    assert evaluate_mir(model, [{**batch, "source": ["pages"] * 4} for batch in probe]).sources == {}
    mixed = [{**batch, "source": ["pages", "captions"] * 2} for batch in probe]
    assert evaluate_mir(model, mixed).sources == {}


def test_influences_of_two_ranks_are_those_of_one():
    influence, error = _influence_on(0, 1)
    for found in run_on_ranks(_influence_on, 2):
        np.testing.assert_allclose(found[0], influence, rtol=1e-6, atol=1e-9)
        assert found[1] == pytest.approx(error, rel=1e-6)


def test_no_interval_where_tokens_are_replaced(probe):
    assert evaluate_mir(tiny_llava(), probe).standard_error is None
    with pytest.raises(ValueError, match=r'interval needs variant "paper" or "robust", got .official'):
        evaluate_mir(tiny_llava(), probe, "official", interval=True)


def test_effective_rank_of_either_order(probe):
    tokens = _reference_tokens(model := tiny_llava().eval(), probe)
    results = [evaluate_mir(model, probe, rank_order=order) for order in (1, 2)]
    for layer, sides in enumerate(zip(*tokens, strict=True)):
        for side, x in enumerate(sides):
            x = x.double().numpy()
            eigenvalues = np.linalg.eigvalsh(np.cov(x[~oracle.outliers(x)].T)).clip(0)
            p = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
            expected = np.exp(-(p * np.log(p)).sum()), 1 / (p**2).sum()
            for result, rank in zip(results, expected, strict=True):
                assert result.effective_rank[layer, side].item() == pytest.approx(rank, rel=1e-6)
    with pytest.raises(ValueError, match="rank_order must be one of 1, 2, got 3"):
        evaluate_mir(model, probe, rank_order=3)


def test_products_are_named_and_change_nothing_that_matters(probe, monkeypatch):
    monkeypatch.setattr("mir_lightning.metrics.cloud._LEAST_ROOM", 2000)  # so that tokens become moments
    model = tiny_llava().eval()
    exact, named, short = (evaluate_mir(model, probe, products=p) for p in ("auto", "float64", "float32"))
    assert [result.products for result in (exact, named, short)] == ["float64", "float64", "float32"]
    assert torch.equal(exact.layers, named.layers)
    assert not torch.equal(exact.layers, short.layers)
    np.testing.assert_allclose(short.layers, exact.layers, rtol=1e-5)
    assert short.mir == pytest.approx(exact.mir, rel=1e-6)
    with pytest.raises(ValueError, match="products must be one of auto, float64, float32, got 'bfloat16'"):
        evaluate_mir(model, probe, products="bfloat16")


def test_everything_with_an_entry_a_sample_is_halved():
    """Lists, arrays and what lies in dicts go with their samples; plain values stay."""
    seen = []

    def scaled(net, batch):
        seen.append((len(batch["input_ids"]), batch["scale"]))
        if len(batch["input_ids"]) > 1:
            raise torch.OutOfMemoryError("too large")
        hidden = torch.nn.functional.one_hot(batch["input_ids"], 64).float()
        for row, factors in enumerate(zip(batch["list"], batch["nested"]["array"], batch["tuple"], strict=True)):
            hidden[row] *= factors[0][0] * factors[1] + len(factors[2] or "")
        return [hidden @ torch.linspace(0.1, 1, 64 * 8).view(64, 8).sin()]

    whole = tiny_batch(padded=0, labels=False)
    extras = {
        "list": [[1.0], [2.0], torch.tensor([3.0]), [4.0]],
        "nested": {"array": np.array([5.0, 6.0, 7.0, 8.0])},
        "tuple": ("", "a", None, "of"),
        "scale": 3,
        "vision_mask": whole["input_ids"] == IMAGE_TOKEN,
    }
    probe = Probe([{**whole, **extras}])
    net = torch.nn.Linear(1, 1)
    halved = evaluate_mir(net, probe, hidden_states=scaled)
    singles = [
        {
            **{k: v[i : i + 1] for k, v in whole.items()},
            **{k: extras[k][i : i + 1] for k in ("list", "tuple", "vision_mask")},
            "nested": {"array": extras["nested"]["array"][i : i + 1]},
            "scale": 3,
        }
        for i in range(4)
    ]
    assert halved.mir == pytest.approx(evaluate_mir(net, Probe(singles), hidden_states=scaled).mir, rel=1e-9)
    assert seen[:3] == [(4, 3), (2, 3), (1, 3)]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (torch.zeros(3), "extra: it has no row for each"),
        ([1, 2, 3], "extra: it has no row for each"),
        ({"inner": np.zeros(3)}, r"extra\.inner: it has no row for each"),
        ([336, 336, 3.0, 3], "extra: its numbers may be one of each"),
        ({"inner": (np.float64(1), torch.tensor(2), 1, True)}, r"extra\.inner: its numbers may be one of each"),
    ],
)
def test_batches_that_cannot_be_split_are_not_halved(extra, message):
    model = tiny_llava()
    model.register_forward_pre_hook(_refuse_more_than(1), with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError, match=rf"cannot be cut in two by {message}.* of its 4 samples"):
        evaluate_mir(model, Probe([{**tiny_batch(), "extra": extra}]))


def test_a_sample_of_tokens_of_the_middle_or_a_chosen_layer(probe):
    model = tiny_llava().eval()
    vision, text = _reference_tokens(model, probe)
    for chosen, layer in ((None, 2), (3, 3)):
        result = evaluate_mir(model, probe, sample_layer=chosen)
        assert result.sample_layer == layer
        for sample, tokens in zip(result.sample, (vision, text), strict=True):
            assert 50 < len(sample) <= len(tokens[layer - 1])
            distances = torch.cdist(sample.double(), tokens[layer - 1].double()).min(dim=1).values
            assert distances.max() < 1e-4


def test_in_a_fabric_loop(probe):
    expected = evaluate_mir(tiny_llava().eval(), probe)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    plain = tiny_llava()
    model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=1e-3))
    result = evaluate_mir(model, probe, forward=model)
    assert result.mir != expected.mir  # entered through Fabric's wrapper, so in its precision
    assert result.mir == pytest.approx(expected.mir, abs=0.02)
    fabric.backward(model(**tiny_batch()).loss)
    optimizer.step()


def test_peft_models_are_entered_as_training_enters_them():
    batch = tiny_batch(seed=100, padded=0)
    batch["input_ids"][:, 14:16] = torch.tensor([9, 10])  # what switches the adapter on, from there
    adapter = {"target_modules": ["q_proj", "down_proj"], "r": 4, "init_lora_weights": False}
    config = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[9, 10], **adapter)
    model = peft.get_peft_model(tiny_llava(), config).eval()
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states[1:]
    vision = batch["input_ids"] == IMAGE_TOKEN
    text = (vision.cumsum(1) > 0) & ~vision
    expected = modality_integration_rate([h[vision] for h in states], [h[text] for h in states])
    assert evaluate_mir(model, Probe([batch])).mir == pytest.approx(expected.item(), abs=1e-9)


def test_prompt_learning_is_refused():
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=3, num_attention_heads=1, token_dim=12
    )
    with pytest.raises(ValueError, match=r"PREFIX_TUNING .* virtual tokens .* LoRA"):
        evaluate_mir(peft.get_peft_model(tiny_llava(), config), Probe([tiny_batch()]))


def test_a_second_name_of_a_part_is_no_second_model():
    module = torch.nn.Module()
    module.vlm = tiny_llava()
    module.lm = module.vlm.model.language_model
    assert evaluate_mir(module, Probe([tiny_batch()])).mir == evaluate_mir(module.vlm, Probe([tiny_batch()])).mir


def test_a_probe_with_fewer_tokens_than_the_width_is_told_how_many_more_it_needs():
    with pytest.warns(ProbeWarning, match=r"10 vision tokens .* 24 wide.* 14 more"):
        evaluate_mir(tiny_llava(), Probe([tiny_batch(batch=1)]))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_picture_at_position_0_is_warned_of_once(side):
    batch = tiny_batch(seed=30 + len(side), before=0)
    if side == "left":  # the first sample's pad tokens come before its picture
        pad = torch.zeros(4, 2, dtype=torch.long)
        batch = {k: torch.cat([pad, v], 1) if v.ndim == 2 else v for k, v in batch.items()}
    shifted = Probe([tiny_batch(), batch])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(2):
            evaluate_mir(tiny_llava(seed), shifted)
    told = [str(warning.message) for warning in caught if "attention sink" in str(warning.message)]
    assert len(told) == 1
    assert "Put text or a begin-of-text token before the picture" in told[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ProbeWarning)
        evaluate_mir(tiny_llava(), Probe([tiny_batch(seed=40 + len(side)), tiny_batch(seed=9)]))


class HandWritten(torch.nn.Module):
    """No Hugging Face model: blocks and a final norm under names of their own, pictures put in by a projection."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.patches = torch.nn.Embedding(20, 8), torch.nn.Linear(5, 8)
        self.decoder = torch.nn.Module()
        self.decoder.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(3)])
        self.decoder.norm = torch.nn.LayerNorm(8)
        self.clip = tiny_llava().model.vision_tower  # a Hugging Face model that is not the decoder

    def forward(self, input_ids, pictures, labels=None):
        hidden = torch.cat([self.patches(pictures["patches"]), self.embed(input_ids[:, 4:])], dim=1)
        for block in self.decoder.blocks:
            hidden = torch.tanh(block(hidden))
        hidden = self.decoder.norm(hidden)
        loss = None if labels is None else hidden.square().mean()
        return SimpleNamespace(last=hidden, loss=loss)


def test_plain_modules_by_the_paths_of_their_layers():
    batch = {
        "input_ids": torch.arange(30).view(3, 10) % 20,
        "pictures": {"patches": torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))},
        "labels": torch.ones(3, 10, dtype=torch.long),
        "vision_mask": (torch.arange(10) < 4).expand(3, 10),
    }
    model = HandWritten()
    result = evaluate_mir(model, Probe([batch]), layers="decoder.blocks", norm="decoder.norm")
    with torch.no_grad():
        output = model(batch["input_ids"], batch["pictures"], batch["labels"])
    vision, text = (output.last[mask] for mask in (batch["vision_mask"], ~batch["vision_mask"]))
    expected = modality_integration_rate([vision], [text], return_layers=True)[1]
    assert len(result.layers) == 3
    assert result.layers[-1].item() == pytest.approx(expected.item(), rel=1e-9)
    assert result.loss == pytest.approx(output.loss.item())
    with pytest.raises(ValueError, match=r"norm='decoder.none' names no submodule of HandWritten"):
        evaluate_mir(model, Probe([batch]), layers="decoder.blocks", norm="decoder.none")
    half = model.bfloat16()  # nested tensors follow the model's precision too
    assert evaluate_mir(half, Probe([batch]), layers="decoder.blocks", norm="decoder.norm").mir == pytest.approx(
        result.mir, abs=0.05
    )


class Writing(HandWritten):
    """Writes into what it is given, as preprocessing inside a model does."""

    def forward(self, input_ids, pictures, labels=None):
        pictures["patches"].sub_(0.5).div_(0.25)
        return super().forward(input_ids, pictures, labels)


def _hand_batch():
    return {
        "input_ids": torch.arange(30).view(3, 10) % 20,
        "pictures": {"patches": torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))},
        "vision_mask": (torch.arange(10) < 4).expand(3, 10),
    }


PLACES = {"layers": "decoder.blocks", "norm": "decoder.norm"}


@pytest.mark.parametrize("check", [False, True])
def test_layers_of_another_part_are_said_to_be_none_of_the_decoders(check):
    path = "model.vision_tower.encoder.layers"
    message = (
        rf"layers='{path}': decoder layer 0 gave \[4, 10, 16\] where .* B, S = \[4, 19\] of input_ids was "
        "expected: these are not the layers of the text decoder, which would do, or the model inserts"
    )
    with pytest.raises(ValueError, match=message):
        evaluate_mir(tiny_llava(), Probe([tiny_batch()]), layers=path, check=check)
    model = tiny_llava()
    model.idle = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"layers='idle': the decoder's (first|last) layer did not run"):
        evaluate_mir(model, Probe([tiny_batch()]), layers="idle", check=check)


def test_nothing_writes_into_a_probe():
    batch = _hand_batch()
    probe = Probe([batch])
    first = evaluate_mir(Writing(), probe, **PLACES)
    batch["pictures"]["patches"].zero_()
    assert evaluate_mir(Writing(), probe, **PLACES).mir == first.mir
    assert Probe([probe[0]]).fingerprint == probe.fingerprint == Probe([_hand_batch()]).fingerprint


def test_layers_that_share_a_module_are_told_apart_by_their_calls():
    model = HandWritten()
    model.decoder.blocks[1] = model.decoder.blocks[0]
    batch = _hand_batch()
    with torch.no_grad():
        hidden = torch.cat(
            [model.patches(batch["pictures"]["patches"]), model.embed(batch["input_ids"][:, 4:])], 1
        )
        states = []
        for block in model.decoder.blocks:
            states.append(block(hidden))
            hidden = torch.tanh(states[-1])
        states[-1] = model.decoder.norm(hidden)
    vision, text = ([state[mask] for state in states] for mask in (batch["vision_mask"], ~batch["vision_mask"]))
    expected = modality_integration_rate(vision, text, return_layers=True)[1]
    found = evaluate_mir(model, Probe([batch]), **PLACES).layers
    torch.testing.assert_close(found, expected)
    assert found[0] != found[1]


@pytest.mark.parametrize("norm", ["decoder.blocks.0", "clip.post_layernorm"])
def test_a_final_norm_that_does_not_run_last_is_refused(norm):
    with pytest.raises(ValueError, match=f"norm='{norm}' did not run after the decoder's last layer"):
        evaluate_mir(HandWritten(), Probe([_hand_batch()]), layers="decoder.blocks", norm=norm)


def test_quantised_weights_say_nothing_of_the_inputs():
    model = HandWritten()
    plain = evaluate_mir(model, Probe([_hand_batch()]), **PLACES).mir
    packed = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    model._parameters = {"packed": packed, **model._parameters}
    assert next(model.parameters()).dtype == torch.uint8
    assert evaluate_mir(model, Probe([_hand_batch()]), **PLACES).mir == plain


@pytest.mark.parametrize(
    "labels", [torch.ones(3, dtype=torch.long), {"text": torch.ones(3, 10, dtype=torch.long)}]
)
def test_labels_of_any_shape_leave_mir_alone(labels):
    model, batch = HandWritten(), _hand_batch()
    plain = evaluate_mir(model, Probe([batch]), **PLACES)
    found = evaluate_mir(model, Probe([{**batch, "labels": labels}]), **PLACES)
    assert found.mir == plain.mir
    assert found.loss is not None


def test_the_self_check_is_halved_too_and_looks_into_nested_pixels():
    model, seen = tiny_llava(), []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: _refuse(args[0] if args else kwargs["pixel_values"], seen), with_kwargs=True
    )
    result = evaluate_mir(model, Probe([tiny_batch()]), check=True)
    assert result.checked
    assert result.mir == pytest.approx(evaluate_mir(tiny_llava(), Probe([tiny_batch()])).mir, rel=1e-9)
    assert max(seen) == 4
    nested = evaluate_mir(HandWritten(), Probe([_hand_batch()]), **PLACES, check=True)
    assert nested.checked


def _refuse(inputs, seen):
    seen.append(len(inputs))
    if seen[-1] > 2:
        raise torch.OutOfMemoryError("too many")


def test_pictures_that_are_a_samples_by_number_only_are_not_halved():
    batch = tiny_batch(batch=2, padded=0)
    batch["input_ids"][1] = 9  # no picture; the first sample has two
    batch["vision_mask"] = batch["input_ids"] == IMAGE_TOKEN
    pixels = batch.pop("pixel_values")
    for pictures, name in ((pixels, "pixel_values"), (pixels.numpy(), "array"), (list(pixels), "list")):
        probe = Probe([{**batch, name: pictures}])
        batches = MaskedBatches(probe, [TokenMasks(batch["vision_mask"], ~batch["vision_mask"])]).halved()
        with pytest.raises(torch.OutOfMemoryError, match=f"by {name}: .* by number only"):
            batches[0]
    told = MaskedBatches(Probe([{**batch, "told": [[*pixels], []]}]), batches.masks).halved()
    assert [len(told[part][0]["told"][0]) for part in (0, 1)] == [2, 0]


def test_no_cache_is_made_where_the_signature_does_not_say_so():
    model, caches = tiny_llava(), []
    model.model.language_model.register_forward_hook(lambda m, args, output: caches.append(output.past_key_values))
    evaluate_mir(model, Probe([tiny_batch()]))
    assert caches == [None]


@pytest.mark.parametrize("layer", [0, -1, 99])
def test_a_layer_to_sample_has_to_be_there(layer):
    with pytest.raises(ValueError, match=r"sample_layer must lie in 1 .. 3"):
        evaluate_mir(tiny_llava(), Probe([tiny_batch()]), sample_layer=layer)


def test_batches_are_a_probe_too():
    assert evaluate_mir(tiny_llava(), [tiny_batch()]).mir == evaluate_mir(tiny_llava(), Probe([tiny_batch()])).mir


class Expanding(torch.nn.Module):
    """Puts four vision tokens where its ids have one placeholder, as LLaVA's first code did."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask, patches, output_hidden_states):
        first = self.embed(input_ids)
        hidden = torch.cat([first[:, :2], patches, first[:, 3:]], dim=1)
        return SimpleNamespace(hidden_states=[hidden, self.layer(hidden)])


def test_vision_tokens_put_in_inside_by_the_example_of_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    (block,) = re.findall(r"```python\n(def hidden_states.*?)```", page, re.DOTALL)
    ids = torch.randint(5, 20, (3, 8), generator=torch.Generator().manual_seed(0))
    ids[:, 2] = 4
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "patches": torch.randn(3, 4, 8)}
    batch["attention_mask"][2, 6:] = 0
    names = {"torch": torch, "evaluate_mir": evaluate_mir, "Probe": Probe, "model": Expanding(), "batch": batch}
    names["placeholder"] = 4
    exec(block.replace("evaluate_mir(", "result = evaluate_mir(").replace("576", "4"), names)
    vision = torch.zeros(3, 11, dtype=torch.bool)
    vision[:, 2:6] = True
    text = ~vision
    text[2, 9:] = False
    hidden = names["model"](ids, None, batch["patches"], True).hidden_states[1].detach()
    expected = modality_integration_rate([hidden[vision]], [hidden[text]]).item()
    assert names["result"].mir == pytest.approx(expected, rel=1e-9)
