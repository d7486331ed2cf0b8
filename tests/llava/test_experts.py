"""Routers of any family, their losses against NumPy and autograd, and how they enter training."""

import csv
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from mir_lightning import MIRCallback, Probe, evaluate_mir
from mir_lightning.llava.model.experts import (
    RouterLosses,
    expert_load,
    expert_matrices,
    find_routers,
    recording,
    router_losses,
)
from mir_lightning.llava.model.module import LlavaPretraining, model_inputs
from mir_lightning.llava.model.stages import Part, Stage
from tests.distributed import run_on_ranks
from tests.families import MOE, build_family, family_batch
from tests.models import tiny_batch, tiny_llava
from tests.training import Environment, fit

SIZE = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
FAMILIES = {
    "mixtral": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 8},
    "qwen3_moe": {"head_dim": 12},
    "olmoe": {},
    "granitemoe": {},
    "phimoe": {},
    "gpt_oss": {"head_dim": 12},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "minimax_m2": {"head_dim": 12, "rotary_dim": 12},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 12,
    },
}
SPARSE = {"ernie4_5_moe": [2, 3], "deepseek_v3": [2, 3]}  # the others: every layer


def _mixtral(seed=0):
    return tiny_llava(seed, text=MixtralConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_processor):
    folder = tmp_path_factory.mktemp("mixtral")
    _mixtral().save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return str(folder)


def _oracle(logits, top_k, mask):
    """Load-balance loss (Switch, equations 4 to 6) and z-loss (ST-MoE, equation 5) of the definitions, float64."""
    valid = mask.flatten().bool().numpy()
    balance, z = [], []
    for layer in logits:
        x = layer.detach().double().numpy()[valid]
        tokens, experts = x.shape
        exponentials = np.exp(x - x.max(axis=1, keepdims=True))
        probability = exponentials / exponentials.sum(axis=1, keepdims=True)
        chosen = np.argsort(-x, axis=1)[:, :top_k]
        f = np.array([(chosen == expert).sum() / tokens for expert in range(experts)])
        balance.append(experts * (f * probability.mean(axis=0)).sum())
        z.append((np.log(np.exp(x).sum(axis=1)) ** 2).mean())
    return np.mean(balance), np.mean(z)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_routers_say_is_what_the_family_itself_returns(family):
    torch.manual_seed(0)
    text = AutoConfig.for_model(family, **{**SIZE, **MOE, **FAMILIES[family]})
    vlm = tiny_llava(text=text).eval()
    routers, batch = find_routers(vlm), tiny_batch()
    assert [router.layer for router in routers] == SPARSE.get(family, [1, 2, 3])
    with recording(routers) as logits:
        vlm(**batch)
    inputs = {"attention_mask": batch["attention_mask"], "output_router_logits": True}
    llm = AutoModelForCausalLM.from_config(text).eval()
    llm.base_model.load_state_dict(vlm.model.language_model.state_dict())
    embedded = []
    vlm.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: embedded.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    vlm(**batch)
    expected = llm.base_model(inputs_embeds=embedded[0], **inputs).router_logits
    assert len(logits) == len(expected) == len(routers)
    for ours, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours, theirs.reshape(ours.shape))
    assert all(torch.isfinite(loss) for loss in router_losses(logits, 2, batch["attention_mask"]))
    assert len(expert_matrices(vlm)) >= 2 * len(routers)


def test_a_whole_vlm_with_experts():
    vlm, batch = build_family("qwen3_vl_moe"), family_batch("qwen3_vl_moe")
    routers = find_routers(vlm)
    with recording(routers) as logits:
        vlm(**batch)
    assert [router.layer for router in routers] == [1, 2, 3]
    expected = vlm(**batch, output_router_logits=True).router_logits
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))


def test_a_dense_model_has_no_routers_and_no_experts():
    assert find_routers(tiny_llava()) == []
    assert expert_matrices(tiny_llava()) == set()


@pytest.mark.parametrize("scale", [0.25, 16.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_those_of_the_definitions(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    mask = tiny_batch(padded=5)["attention_mask"]
    ranks = [torch.rand(mask.numel(), 6, generator=generator).argsort(dim=1) for _ in range(3)]  # no ties
    logits = [(scale * rank - 2).to(dtype) for rank in ranks]
    assert [loss.item() for loss in router_losses(logits, 2, mask)] == pytest.approx(_oracle(logits, 2, mask))


def test_balanced_routers_lose_top_k_and_padding_says_nothing():
    logits = torch.eye(4)[torch.arange(8) % 4] + torch.eye(4)[(torch.arange(8) + 1) % 4]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    balance, _ = router_losses([logits], 2, mask)
    assert balance.item() == pytest.approx(2)
    logits[4:] = torch.tensor([50.0, 0, 0, 0])
    assert router_losses([logits], 2, mask)[0].item() == pytest.approx(2)
    assert router_losses([logits], 2, torch.ones(1, 8))[0].item() > 2.1


def test_load_is_the_busiest_experts_share():
    routers = find_routers(_mixtral())[:2]
    even = torch.eye(4)[torch.arange(8) % 4] + torch.eye(4)[(torch.arange(8) + 1) % 4]
    same = torch.tensor([[9.0, 5, 1, 0]]).expand(8, 4)
    load = expert_load(routers, [even, same], 2, torch.ones(2, 4))
    assert load == {"moe/load/layer_01": pytest.approx(1), "moe/load/layer_02": pytest.approx(2)}


def test_routers_of_another_number_of_tokens_are_refused():
    with pytest.raises(
        ValueError, match=r"the routers saw 8 tokens of 6 in the batch, .* set model.router to null"
    ):
        router_losses([torch.zeros(8, 4)], 2, torch.ones(2, 3))


@pytest.mark.parametrize("name", ["balance", "z"])
def test_bad_weights(name):
    with pytest.raises(ValueError, match=f"{name} of router must be 0 or more, got -1"):
        RouterLosses(**{name: -1})


def _module(folder, *parts, **options):
    stages = [Stage([Part(part, 1e-3) for part in parts or ("projector", "llm")])]
    module = LlavaPretraining(vlm=folder, stages=stages, warmup_ratio=0.0, **options)
    module.configure_model()
    return module


class Gradients(pl.Callback):
    """What the optimizer is given at the first step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            named = pl_module.vlm.named_parameters()
            self.found = {name: p.grad.clone() for name, p in named if p.grad is not None}


def _fit(module, root, batches, callbacks=(), **options):
    gradients = Gradients()
    options = {"max_steps": 1, "logger": False, "use_distributed_sampler": False, **options}
    fit(root, [gradients, *callbacks], module, data=DataLoader(batches, batch_size=None), **options)
    return gradients.found


def _by_hand(module, batches, weights=RouterLosses()):
    """Gradients of cross-entropy and routers' losses, averaged over the batches, of formulas written out."""
    module.vlm.zero_grad()
    for batch in batches:
        with recording(find_routers(module.vlm)) as logits:
            loss = module.vlm(**model_inputs(batch, flash=False)).loss
        valid = batch["attention_mask"].flatten().bool()
        for layer in logits:
            x = layer[valid]
            f = torch.zeros(4).index_add(0, x.topk(2).indices.flatten(), torch.ones(2 * len(x))) / len(x)
            balance = 4 * (f * x.softmax(-1).mean(0)).sum()
            z = x.exp().sum(-1).log().square().mean()
            loss = loss + (weights.balance * balance + weights.z * z) / len(logits)
        (loss / len(batches)).backward()
    return {name: p.grad for name, p in module.vlm.named_parameters() if p.grad is not None}


def _close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_has_the_gradient_of_the_whole_loss(folder, tmp_path, checkpointing, accumulated):
    batches = [tiny_batch(seed=s, padded=2 + 3 * s) for s in range(accumulated)]
    weights = RouterLosses(balance=0.5, z=0.2)
    module = _module(folder, router=weights, gradient_checkpointing=checkpointing)
    found = _fit(module, tmp_path, batches, accumulate_grad_batches=accumulated)
    _close(found, _by_hand(_module(folder), batches, weights))
    plain = _fit(_module(folder, router=None), tmp_path, batches, accumulate_grad_batches=accumulated)
    router = "model.language_model.layers.0.mlp.gate.weight"
    assert not torch.allclose(found[router], plain[router], rtol=0.1)


@pytest.mark.parametrize("options", [{}, {"router": None}])
def test_frozen_routers_bend_no_tokens(folder, tmp_path, options):
    batches = [tiny_batch()]
    found = _fit(_module(folder, "projector", **options), tmp_path, batches)
    module = _module(folder, "projector")
    module.vlm(**tiny_batch()).loss.backward()
    _close(found, {name: p.grad for name, p in module.vlm.named_parameters() if p.requires_grad})


def test_what_is_logged_and_that_probes_see_no_hooks(folder, tmp_path):
    probe = Probe([tiny_batch(seed=9)])
    module, logger = _module(folder), CSVLogger(tmp_path)
    hooks = []

    class Watch(MIRCallback):
        def _measure(self, *args, **kwargs):
            hooks.append([len(router.module._forward_hooks) for router in module._routers])
            return super()._measure(*args, **kwargs)

    expected = evaluate_mir(module.vlm, probe).mir
    batch = tiny_batch()
    with torch.no_grad(), recording(module._routers) as logits:
        loss = module.vlm(**batch).loss.item()
    _fit(module, tmp_path, [batch] * 2, [Watch(probe, every_n_steps=1)], logger=logger, max_steps=2)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    assert float(next(row["mir"] for row in rows if row["mir"])) == pytest.approx(expected, rel=1e-6)
    first = next(row for row in rows if row["train/loss"])
    logged = [float(first[f"train/{name}"]) for name in ("loss", "router_balance", "router_z")]
    assert logged == pytest.approx([loss, *_oracle(logits, 2, batch["attention_mask"])], rel=1e-5)
    assert [1 <= float(first[f"moe/load/layer_0{layer}"]) <= 2 for layer in (1, 2, 3)] == [True] * 3
    assert all(count == 0 for counts in hooks for count in counts)
    assert evaluate_mir(module.vlm, probe).mir == float([row["mir"] for row in rows if row["mir"]][-1])


def _on_a_rank(rank, world, folder, batches):
    module = _module(folder)
    strategy = DDPStrategy(cluster_environment=Environment(rank, world, 0), process_group_backend="gloo")
    logged = {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            logged.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    found = _fit(module, folder, [batches[rank]], [Keep()], devices=world, strategy=strategy)
    return found, logged


def test_two_processes_weigh_each_token_alike(folder):
    """The z-loss, a mean over tokens, is that of all batches as one; so is the cross-entropy."""
    batches = [tiny_batch(seed=0, padded=0), tiny_batch(seed=1, batch=2, padded=5)]
    batches[1]["labels"][:, :-4] = -100
    results = run_on_ranks(_on_a_rank, 2, folder, batches)
    module = _module(folder)
    shares = [batch["attention_mask"].sum() for batch in batches]
    labels = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
    whole, rows = 0.0, []
    for batch, share, labelled in zip(batches, shares, labels, strict=True):
        with recording(module._routers) as logits:
            loss = module.vlm(**batch).loss
        balance, z = router_losses(logits, 2, batch["attention_mask"])
        whole = whole + loss * labelled / sum(labels) + (0.01 * balance + 0.001 * z) * share / sum(shares)
        rows.append([layer[batch["attention_mask"].flatten().bool()] for layer in logits])
    whole.backward()
    _close(results[0][0], {name: p.grad for name, p in module.vlm.named_parameters() if p.requires_grad})
    together = [torch.cat(layers) for layers in zip(*rows, strict=True)]
    _, z = _oracle(together, 2, torch.ones(len(together[0])))
    for found, logged in results:
        assert logged["train/router_z"] == pytest.approx(z, rel=1e-5)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, results[0][0][name])
