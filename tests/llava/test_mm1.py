"""MM1's rate by the number of parameters, and where it is resolved."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from mir_lightning.llava.console import stage_table
from mir_lightning.llava.model.experts import find_routers
from mir_lightning.llava.model.mm1 import backbone_size, mm1_rate, resolved
from mir_lightning.llava.model.module import LlavaPretraining
from mir_lightning.llava.model.stages import Part, Stage, optimizer_groups
from mir_lightning.llava.model.upcycling import Upcycling, upcycle
from tests.models import tiny_llava

SIZE = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}
ATTENTION, MLP, NORMS = 24 * 24 * 2 + 24 * 12 * 2, 3 * 24 * 48, 2 * 24
DENSE = 3 * (ATTENTION + MLP + NORMS) + 24


def test_a_30b_gets_the_papers_rate():
    assert mm1_rate(30_000_000_000) == pytest.approx(2.2e-5, rel=0.01)
    assert mm1_rate(9_000_000) == pytest.approx(9_000_000**-0.4214 * math.exp(-0.5535))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_are_not_counted(tied):
    model = tiny_llava(text=LlamaConfig(**SIZE, tie_word_embeddings=tied))
    config = model.config
    config.tie_word_embeddings = tied
    model = LlavaForConditionalGeneration(config)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    assert backbone_size(model) == DENSE


def test_the_experts_of_a_layer_count_as_one():
    sparse = tiny_llava(text=upcycle(LlamaForCausalLM(LlamaConfig(**SIZE)), Upcycling(4, every=3)).config)
    router, gate_of_nothing = 4 * 24, 24
    assert len(find_routers(sparse)) == 1
    assert backbone_size(sparse) == DENSE + router + gate_of_nothing


def test_rate_and_decay_are_numbers_where_the_model_is_known(tmp_path, tiny_processor):
    tiny_llava().save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    stages = [Stage([Part("projector", 1e-3), Part("llm", "mm1", ":2")])]
    module = LlavaPretraining(vlm=str(tmp_path), stages=stages)
    module.configure_model()
    rate = math.exp(-0.4214 * math.log(backbone_size(module.vlm)) - 0.5535)
    assert [(part.lr, part.weight_decay or 0) for part in module.stages[0].train] == [
        (1e-3, 0),
        (pytest.approx(rate), pytest.approx(rate / 10)),
    ]
    row = stage_table(module.vlm, module.stages[0]).splitlines()[3].split()
    assert row[-2:] == [f"{rate:g}", f"{0.1 * rate:g}"]
    decays = sorted({group.weight_decay(0) for group in module._groups})
    assert decays == pytest.approx([0, 0.1 * rate])


def test_a_weight_decay_that_is_given_stays():
    with torch.device("meta"):
        vlm = tiny_llava()
    (stage,) = resolved(vlm, [Stage([Part("llm", "mm1", weight_decay=0.0)])])
    assert stage.train[0].weight_decay == 0
    assert stage.train[0].lr == pytest.approx(mm1_rate(backbone_size(vlm)))
    assert optimizer_groups(vlm, [stage])[0].parts[0].lr == stage.train[0].lr


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match='lr of llm must be above 0, or "mm1", got mm2'):
        Part("llm", "mm2")


@pytest.fixture(scope="module")
def recipe():
    path = Path(__file__).parents[2] / "recipes" / "llava_pretrain.py"
    spec = importlib.util.spec_from_file_location("llava_pretrain", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("given", "read"), [("mm1", "mm1"), ("1.0e-3", 1e-3), ("1e-3", 1e-3), ("2", 2.0)])
def test_a_config_takes_the_word_and_numbers(recipe, tmp_path, capsys, given, read):
    text = "model:\n  upcycle: {experts: 8, every: 2, top_k: 2}\n  router: {balance: 0.02}\n  stages:\n"
    (tmp_path / "config.yaml").write_text(f"{text}    - train:\n        - {{module: llm, lr: {given}}}\n")
    with pytest.raises(SystemExit):
        recipe.main(["fit", "--config", str(tmp_path / "config.yaml"), "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["stages"][0]["train"][0]["lr"] == read
    assert model["upcycle"] == {"experts": 8, "every": 2, "top_k": 2, "seed": 0}
    assert model["router"] == {"balance": 0.02, "z": 0.001}


def test_a_config_with_another_word_says_what_would_do(recipe, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model:\n  stages:\n    - train:\n        - {module: llm, lr: mm2}\n")
    with pytest.raises(SystemExit):
        recipe.main(["fit", "--config", str(tmp_path / "config.yaml"), "--print_config"])
    said = capsys.readouterr().err
    assert "mm2" in said
    assert "mm1" in said
