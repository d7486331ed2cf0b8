"""A dense LLM as a mixture of experts: the same function, in any loader's hands, through a whole training."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mir_lightning import MIRCallback, Probe
from mir_lightning.llava.model.backbones import ModelSource
from mir_lightning.llava.model.experts import find_routers, recording, router_losses
from mir_lightning.llava.model.module import LlavaPretraining, LoraOptions
from mir_lightning.llava.model.saving import export, gathered
from mir_lightning.llava.model.sharding import shard
from mir_lightning.llava.model.stages import Part, Stage, freeze_all_but
from mir_lightning.llava.model.upcycling import Upcycling, upcycle
from tests.distributed import run_on_ranks
from tests.models import IMAGE_TOKEN, tiny_batch, tiny_llava
from tests.training import fit

SIZE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-3,
}
ROPE = {"rope_theta": 300.0, "rope_type": "linear", "factor": 2.0}
DENSE = {
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, rope_parameters=ROPE, tie_word_embeddings=True)),
    "wide heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, head_dim=10, hidden_act="gelu")),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE)),
    "qwen2 with a window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    ),
}
TEXT = torch.randint(4, 64, (3, 17), generator=torch.Generator().manual_seed(0))


def _dense(name):
    """Nothing of it is at its initial value: norms and biases are random too."""
    torch.manual_seed(0)
    model = DENSE[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.5)
    return model


@pytest.mark.parametrize("options", [(4, 2, 2), (3, 1, 1), (2, 5, 2)])
@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_it_begins_as_the_dense_model_in_any_loaders_hands(name, options, tmp_path):
    dense = _dense(name)
    experts, every, top_k = options
    sparse = upcycle(dense, Upcycling(experts, every, top_k)).eval()
    expected = dense(TEXT).logits
    torch.testing.assert_close(sparse(TEXT).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    kinds = ["experts" in dict(layer.mlp.named_children()) for layer in sparse.model.layers]
    assert kinds == [(number + 1) % every == 0 for number in range(5)]
    tied = dense.lm_head.weight is dense.model.embed_tokens.weight
    assert (sparse.lm_head.weight is sparse.model.embed_tokens.weight) == tied
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(TEXT).logits, sparse(TEXT).logits)
    own = sparse.state_dict()
    assert all(torch.equal(weight, own[key]) for key, weight in loaded.state_dict().items())


@torch.no_grad()
def test_bfloat16_is_as_near_as_the_dense_model_is():
    dense = _dense("tied")
    exact = dense(TEXT).logits
    dense = dense.to(torch.bfloat16)
    sparse = upcycle(dense, Upcycling(4)).eval()
    assert sparse.dtype == torch.bfloat16
    errors = [(model(TEXT).logits.float() - exact).square().mean().sqrt() for model in (dense, sparse)]
    assert 0 < errors[1] < 1.5 * errors[0]


def test_experts_are_copies_of_their_own_and_routers_are_drawn_by_the_seed():
    dense = _dense("tied")
    made = [upcycle(dense, Upcycling(4, seed=seed)) for seed in (0, 0, 1)]
    routers = [[layer.mlp.gate.weight for layer in model.model.layers[1::2]] for model in made]
    assert all(torch.equal(a, b) for a, b in zip(*routers[:2], strict=True))
    assert not torch.equal(routers[0][0], routers[2][0])
    assert not torch.equal(*routers[0])
    assert routers[0][0].std().item() == pytest.approx(0.2, rel=0.3)
    experts = made[0].model.layers[1].mlp.experts
    before = experts.down_proj[1].clone()
    with torch.no_grad():
        experts.down_proj[0] += 1
    assert torch.equal(experts.down_proj[1], before)
    assert torch.equal(before, dense.model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Upcycling(1), "experts must be at least top_k, 2, got 1"),
        (lambda: Upcycling(4, every=0), "every must be at least 1, got 0"),
        (lambda: Upcycling(4, top_k=0), "top_k must be at least 1, got 0"),
        (
            lambda: upcycle(_dense("tied"), Upcycling(4, every=6)),
            "every must be at most the number of layers, 5, got 6",
        ),
        (
            lambda: upcycle(
                GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)), Upcycling(2)
            ),
            r"upcycle takes an LLM of llama, mistral, qwen2 .*, got gpt2",
        ),
        (
            lambda: upcycle(MistralForCausalLM(MistralConfig(**SIZE, sliding_window=8)), Upcycling(2)),
            r"of mistral without sliding_window",
        ),
        (
            lambda: upcycle(LlamaForCausalLM(LlamaConfig(**SIZE, attention_bias=True)), Upcycling(2)),
            r"has no place for model.layers.0.self_attn.o_proj.bias",
        ),
        (
            lambda: upcycle(LlamaForCausalLM(LlamaConfig(**SIZE, mlp_bias=True)), Upcycling(2)),
            r"has no place for model.layers.0.mlp.down_proj.bias",
        ),
        (lambda: ModelSource(vlm="run/model", upcycle=Upcycling(2)), "vlm comes with its own upcycle"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_processor):
    """Folders of a dense LLM like SmolLM2 and of an encoder."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    text = {**SIZE, "vocab_size": len(tiny_processor.tokenizer), "num_hidden_layers": 4}
    LlamaForCausalLM(LlamaConfig(**text, rope_parameters=ROPE, tie_word_embeddings=True)).save_pretrained(
        root / "llm"
    )
    tiny_processor.tokenizer.save_pretrained(root / "llm")
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
    )
    CLIPVisionModel(vision).save_pretrained(root / "vision")
    size = {"height": 12, "width": 12}
    CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size=size).save_pretrained(root / "vision")
    return {"llm": str(root / "llm"), "vision": str(root / "vision"), "feature_select": "full"}


def _module(parts, *train, **options):
    module = LlavaPretraining(
        **parts,
        stages=[Stage([Part(part, 1e-3) for part in train])],
        upcycle=Upcycling(4),
        warmup_ratio=0.0,
        **options,
    )
    module.configure_model()
    return module


def _batch(module, seed=0):
    batch = tiny_batch(seed)
    batch["input_ids"][batch["input_ids"] == IMAGE_TOKEN] = module.vlm.config.image_token_id
    return batch


def _run(module, folder, steps, callbacks=(), resume=None, **options):
    options = {"max_steps": steps, "enable_checkpointing": True, **options}
    fit(folder, callbacks, module, resume, DataLoader([_batch(module)] * 4, batch_size=None), **options)


def _moved(module, before):
    return {name for name, p in module.vlm.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("train", [("projector", "llm"), ("projector", "lora")])
def test_it_is_trained_measured_resumed_exported_and_loaded(parts, tmp_path, train):
    options = {"lora": LoraOptions(r=2)} if "lora" in train else {}
    module = _module(parts, *train, **options)
    before = {name: p.detach().clone() for name, p in module.vlm.named_parameters()}
    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
    logger = CSVLogger(tmp_path)
    mir = MIRCallback(Probe([_batch(module, seed=9)]), every_n_steps=2)
    _run(module, tmp_path, 3, [saving, mir], logger=logger)
    moved = _moved(module, before)
    if "llm" in train:
        experts = "model.language_model.layers.1.mlp.experts."
        assert {f"{experts}gate_up_proj", f"{experts}down_proj", experts[:-8] + "gate.weight"} <= moved
    else:
        assert all(".lora_" in name or "projector" in name for name in moved)
        assert any(".lora_B" in name for name in moved)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows if row["mir"]] == [0, 2, 3]
    trained = [row for row in rows if row["train/loss"]]
    for name in ("train/router_balance", "train/router_z", "moe/load/layer_02", "moe/load/layer_04"):
        assert all(float(row[name]) > 0 for row in trained), name
    assert not any("layer_01" in name for name in rows[0] if name.startswith("moe/"))

    again = _module(parts, *train, **options)
    _run(again, tmp_path, 3, resume=tmp_path / "last.ckpt", logger=False, enable_checkpointing=False)
    for (name, p), q in zip(module.vlm.named_parameters(), again.vlm.parameters(), strict=True):
        assert torch.equal(p, q), name

    export(module.vlm, module.processor, tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    batch = {key: value for key, value in _batch(module).items() if key != "labels"}
    with torch.no_grad():
        expected = module.vlm.eval()(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def _gradients(rank, world, text):
    vlm = tiny_llava(text=text)
    if world > 1:
        shard(vlm, init_device_mesh("cpu", (world,)))
    freeze_all_but(vlm, Stage([Part("llm", 1.0)]))
    batch = tiny_batch()
    with recording(find_routers(vlm)) as logits:
        loss = vlm(**batch).loss
    sum(router_losses(logits, 2, batch["attention_mask"]), loss).backward()
    whole = gathered(vlm)
    learning = {name: p.grad for name, p in vlm.named_parameters() if p.grad is not None}
    weights = None if whole is None else {name: p.detach() for name, p in whole.named_parameters()}
    return {name: g.full_tensor() if world > 1 else g for name, g in learning.items()}, weights


def test_sharded_over_two_processes_it_learns_the_same():
    """Its empty tensors too, which torch cannot gather."""
    text = upcycle(_dense("tied"), Upcycling(4)).config
    expected, weights = _gradients(0, 1, text)
    (found, whole), _ = run_on_ranks(_gradients, 2, text)
    assert found.keys() == expected.keys()
    assert whole.keys() == weights.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert all(torch.equal(whole[name], weight) for name, weight in weights.items())
