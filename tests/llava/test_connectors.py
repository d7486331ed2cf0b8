"""Each connector in a tiny LLaVA: what it makes of the features, and everything that depends on the count."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    MODEL_MAPPING,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)
from transformers import CLIPImageProcessorPil as Pixels

from mir_lightning import Probe, evaluate_image_gain, evaluate_mir
from mir_lightning.llava.costs import training_flops
from mir_lightning.llava.data.batches import ConversationCollator
from mir_lightning.llava.data.prompts import PlainPrompt
from mir_lightning.llava.data.source import Sample
from mir_lightning.llava.model.backbones import ModelSource, build_model, build_processor
from mir_lightning.llava.model.connector import connect, llava_config, llava_processor
from mir_lightning.llava.model.connectors import CONNECTORS
from mir_lightning.llava.model.saving import export, load_part, load_vlm
from mir_lightning.llava.model.stages import Part, Stage, freeze_all_but
from mir_lightning.moca import inject_moca
from mir_lightning.probing import ChoiceProbe, evaluate_choices
from mir_lightning.vlm import parameters_of, token_masks
from tests.families import TEXT, VISION
from tests.items import item, picture
from tests.processors import tokenizer

TOKENS = {"avg_pool": 4, "attention_pool": 5, "c_abstractor": 9, "pixel_shuffle": 4, "resampler": 3}
"""That each makes here of 16 patches; the others keep them all."""


def _text():
    return LlamaForCausalLM.config_class(**{**TEXT, "vocab_size": len(tokenizer("<image>"))})


def _config(connector, visual_tokens=None, vision=None, select="default"):
    vision = vision or CLIPVisionConfig(**VISION)
    image = tokenizer("<image>").convert_tokens_to_ids("<image>")
    return llava_config(_text(), vision, image, -1, select, connector, visual_tokens)


def _built(connector, visual_tokens=None, seed=0, **options):
    """A model and its processor."""
    config = _config(connector, visual_tokens, **options)
    torch.manual_seed(7)
    vision = MODEL_MAPPING[type(config.vision_config)](config.vision_config)
    llm = LlamaForCausalLM(config.text_config)
    torch.manual_seed(seed)
    model = connect(llm, vision, config).eval()
    pixels = Pixels(size={"height": 16, "width": 16}, do_center_crop=False)
    return model, llava_processor(config, pixels, tokenizer("<image>"))


@pytest.fixture(params=list(CONNECTORS))
def built(request):
    """A name, a model with logits far enough apart, and its processor."""
    model, processor = _built(request.param, TOKENS.get(request.param))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return request.param, model, processor


def _batch(processor, count=3):
    samples = [
        Sample((picture(i),), ("What colour? <image>", f"The star is {'red ' * (i + 3)}.")) for i in range(count)
    ]
    made = ConversationCollator(processor, PlainPrompt())(samples)
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def test_the_sequence_holds_what_the_connector_makes(built):
    name, model, processor = built
    batch, tokens = _batch(processor), TOKENS.get(name, 16)
    vision = token_masks(model.config, batch, "all").vision
    assert vision.sum(dim=1).tolist() == [tokens] * 3
    assert model.config.image_seq_length == tokens
    with torch.no_grad():
        seen = model(**batch).image_hidden_states
    assert seen.shape == (3 * tokens, 32)


def test_everything_that_is_measured_runs_on_it(built, tmp_path):
    _, model, processor = built
    probe = Probe([_batch(processor)])
    assert evaluate_mir(model, probe, check=True).mir > 0
    assert evaluate_image_gain(model, probe).gain != 0
    asked = ChoiceProbe(
        [item("one", "<image>What colour? Answer:", "red", "blue", images=[picture(0)])], processor
    )
    assert 0 < evaluate_choices(model, asked).sds < 1
    before = evaluate_mir(model, probe).mir
    inject_moca(model)
    assert evaluate_mir(model, probe).mir == pytest.approx(before, rel=1e-4)
    with torch.no_grad():
        for parameter in parameters_of(model, "moca").values():
            parameter += 0.3
    calibrated = evaluate_mir(model, probe).mir
    assert calibrated != pytest.approx(before, rel=1e-3)
    export(model, processor, tmp_path / "model")
    assert evaluate_mir(load_vlm(str(tmp_path / "model")), probe).mir == calibrated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_is_the_same(built, tmp_path, dtype):
    name, model, processor = built
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=dtype)
    export(model, processor, tmp_path / "model")
    loaded, found = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(found.values())
    assert type(loaded) is type(model)
    assert (type(model) is LlavaForConditionalGeneration) == (name == "mlp")
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and theirs[key].dtype == dtype for key in ours)
    again = _batch(AutoProcessor.from_pretrained(tmp_path / "model"))
    batch = _batch(processor)
    assert all(torch.equal(again[key], batch[key]) for key in batch)
    assert evaluate_mir(loaded.eval(), Probe([again])).mir == evaluate_mir(model, Probe([batch])).mir
    other, _ = _built(name, TOKENS.get(name), seed=1)
    load_part(other, tmp_path / "model" / "projector.safetensors")
    alone = parameters_of(other, "projector")
    assert alone
    assert all(torch.equal(p.to(dtype), ours[key]) for key, p in alone.items())


def test_the_projector_stage_trains_all_of_it_and_nothing_else(built):
    _, model, processor = built
    freeze_all_but(model, Stage([Part("projector", 1.0)]))
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert learning == {id(p) for p in model.model.multi_modal_projector.parameters()}
    model(**_batch(processor), use_cache=False).loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("name", list(CONNECTORS))
def test_the_start_is_drawn_by_the_seed(name):
    starts = [_built(name, TOKENS.get(name), seed)[0].model.multi_modal_projector for seed in (0, 0, 1)]
    first, same, other = (dict(part.named_parameters()) for part in starts)
    assert all(torch.equal(first[key], same[key]) for key in first)
    drawn = [key for key, p in first.items() if p.ndim > 1]
    assert drawn
    assert not any(torch.equal(first[key], other[key]) for key in drawn)
    for key in drawn:
        assert 0.001 < first[key].std() < 1, key
    values = [first[key].flatten()[:8] for key in drawn]
    assert len({tuple(value.tolist()) for value in values}) == len(values)  # no two layers are copies


@pytest.mark.parametrize(
    ("name", "tokens", "says"),
    [
        ("mlp", 9, "model.visual_tokens: mlp makes 16 tokens of a picture, got 9"),
        ("linear", 9, "model.visual_tokens: linear makes 16 tokens of a picture, got 9"),
        ("mlp_norm", 9, "model.visual_tokens: mlp_norm makes 16 tokens of a picture, got 9"),
        ("avg_pool", 9, "model.visual_tokens: avg_pool makes 1, 4, 16 tokens of 4 x 4 patches, got 9"),
        ("pixel_shuffle", 5, "model.visual_tokens: pixel_shuffle makes 1, 4, 16 tokens of 4 x 4 patches, got 5"),
        (
            "c_abstractor",
            25,
            "model.visual_tokens: c_abstractor makes 1, 4, 9, 16 tokens of 4 x 4 patches, got 25",
        ),
        ("attention_pool", 17, "model.visual_tokens: attention_pool makes 1 to 16 tokens, .* features, got 17"),
        ("resampler", 0, "model.visual_tokens: resampler makes 1 to 16 tokens, .* features, got 0"),
        ("perceiver", None, "model.connector must be one of mlp, linear, .*, got 'perceiver'"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(name, tokens, says):
    with pytest.raises(ValueError, match=says):
        _config(name, tokens)


@pytest.mark.parametrize("name", list(CONNECTORS))
def test_registers_are_kept_by_queries_and_dropped_by_grids(name):
    vision = Dinov2WithRegistersConfig(
        **{key: value for key, value in VISION.items() if key != "intermediate_size"}, num_register_tokens=2
    )
    model, processor = _built(name, vision=vision, select="full")
    patches = name in ("avg_pool", "c_abstractor", "pixel_shuffle")
    assert model.config.image_seq_length == 16 + 3 * (not patches)
    assert evaluate_mir(model, Probe([_batch(processor)]), check=True).mir > 0


def _oblong(connector, visual_tokens=None):
    """What a connector needs of the config of a model whose pictures are 4 x 6 patches."""
    return SimpleNamespace(
        vision_config=SimpleNamespace(image_size=(16, 24), patch_size=4, hidden_size=16),
        text_config=SimpleNamespace(hidden_size=8),
        connector=connector,
        visual_tokens=visual_tokens,
        features_per_image=25,
    )


def test_oblong_grids_keep_their_proportions():
    features = torch.randn(2, 25, 16)
    pooled = CONNECTORS["avg_pool"](_oblong("avg_pool", 6))
    cells = features[:, 1:].reshape(2, 2, 2, 3, 2, 16).mean(dim=(2, 4)).reshape(2, 6, 16)
    torch.testing.assert_close(pooled(features), pooled.to_llm(cells))
    shuffled = CONNECTORS["pixel_shuffle"](_oblong("pixel_shuffle", 6))
    cells = features[:, 1:].reshape(2, 2, 2, 3, 2, 16).permute(0, 1, 3, 5, 2, 4).reshape(2, 6, 64)
    torch.testing.assert_close(shuffled(features), shuffled.to_llm(cells))
    assert CONNECTORS["c_abstractor"](_oblong("c_abstractor", 6))(features).shape == (2, 6, 8)
    with pytest.raises(ValueError, match="avg_pool makes 6, 24 tokens of 4 x 6 patches, got 4"):
        CONNECTORS["avg_pool"](_oblong("avg_pool", 4))


def test_queries_look_at_places():
    """The same features elsewhere are other features."""
    for name in ("attention_pool", "resampler"):
        connector = CONNECTORS[name](_oblong(name, 5)).eval()
        features = torch.randn(1, 25, 16)
        assert not torch.allclose(connector(features), connector(features.flip(1)))


@pytest.mark.parametrize("name", ["mlp", "avg_pool", "pixel_shuffle"])
@pytest.mark.parametrize("parts", [["projector"], ["projector", "llm", "vision"]], ids=" ".join)
def test_operations_are_counted_by_patches_before_the_connector_and_by_tokens_behind_it(name, parts):
    wide = CLIPVisionConfig(**{**VISION, "hidden_size": 96, "intermediate_size": 192})
    model, processor = _built(name, TOKENS.get(name), vision=wide)
    model.set_attn_implementation("eager")  # the others are not counted on CPU
    freeze_all_but(model, Stage([Part(part, 1.0) for part in parts]))
    batch = _batch(processor)
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False).loss.backward()
    valid = int(batch["attention_mask"].sum())
    batch["labels"] = batch["input_ids"]  # this forward makes all logits
    ours = training_flops(model)(batch, token_masks(model.config, batch, "all").vision)
    assert ours == pytest.approx(counter.get_total_flops() * valid / batch["input_ids"].numel(), rel=0.15)


@pytest.mark.slow
def test_the_packaged_model_takes_them():
    source = ModelSource(connector="c_abstractor", visual_tokens=9, image_size=128)  # of 16 patches
    processor = build_processor(source)
    model = build_model(source, processor)
    batch = _batch(processor)
    assert int(token_masks(model.config, batch, "all").vision[0].sum()) == 9
    made = model(**batch)
    assert not made.image_hidden_states.any()  # pictures say nothing until trained to
    made.loss.backward()
    assert model.model.multi_modal_projector.to_llm[-1].weight.grad.any()
