import time
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig

from mir_lightning.callbacks.base import ProbingCallback
from mir_lightning.llava.costs import Throughput, training_flops, training_memory
from mir_lightning.llava.model.stages import Part, Stage, freeze_all_but
from mir_lightning.report import read_run
from mir_lightning.vlm import token_masks
from tests.families import build_family, family_batch
from tests.models import llava_7b, tiny_batch, tiny_llava
from tests.training import Pretraining, fit


@pytest.mark.parametrize(
    "parts",
    [
        [Part("projector", 1.0)],
        [Part("projector", 1.0), Part("llm", 1.0)],
        [Part("projector", 1.0), Part("llm", 1.0), Part("vision", 1.0)],
    ],
    ids=["projector", "llm", "all"],
)
def test_operations_of_a_step_are_those_that_torch_counts(parts):
    model, batch = build_family("llava"), family_batch("llava")
    model.set_attn_implementation("eager")  # the others are not counted on CPU
    freeze_all_but(model, Stage(parts))
    labels = batch["input_ids"]
    with FlopCounterMode(display=False) as counter:
        model(**batch, labels=labels, use_cache=False).loss.backward()
    vision = token_masks(model.config, batch, "all").vision
    ours = training_flops(model)({**batch, "labels": labels}, vision)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_of_experts_those_count_that_a_token_goes_through():
    """As many as in the dense model with an MLP as wide as two experts, but for the routers and what is beside."""
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    text = {"mixture": MixtralConfig(**size, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2)}
    text["dense"] = MixtralConfig(**size, intermediate_size=128, num_local_experts=1, num_experts_per_tok=1)
    batch, flops = tiny_batch(), {}
    for name, config in text.items():
        model = tiny_llava(text=config)
        freeze_all_but(model, Stage([Part("llm", 1.0)]))
        flops[name] = training_flops(model)(batch, token_masks(model.config, batch, "all").vision)
    routers = 2 * (8 - 1) * 64 * 6 * batch["attention_mask"].sum().item()
    assert flops["mixture"] == pytest.approx(flops["dense"] + routers)


def test_waiting_is_counted_and_not_working(tmp_path):
    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            time.sleep(0.04)
            return tiny_batch(seed=index)

    class Working(Pretraining):
        def training_step(self, batch, batch_idx):
            time.sleep(0.08)
            return super().training_step(batch, batch_idx)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(Slow(), batch_size=None)

    class Seconds(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            seen.append(sum(trainer.profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]))

    seen = []
    fit(tmp_path, [Throughput(window_size=2), Seconds()], Working(), max_steps=4)
    assert all(0.04 <= waited < 0.06 for waited in seen)  # of one batch
    shares = [share for _, share in read_run(tmp_path).curves["train/data_wait"]]
    assert all(0 < share < 0.04 / 0.12 for share in shares)


def sleep(network, probe, **options):
    time.sleep(0.3)
    return SimpleNamespace(seconds=0.3)


class SlowProbe(ProbingCallback):
    """Takes a third of a second after each step."""

    label, best, evaluator = "Slow", "min", staticmethod(sleep)

    def __init__(self):
        super().__init__(SimpleNamespace(fingerprint=""), 1, False, False, name="slow", on_error="raise")

    def make_probe(self, source):
        return source

    def values(self, result):
        return {}


@pytest.mark.parametrize("first", [True, False])
def test_the_time_of_probes_counts_neither_as_training_nor_as_waiting(tmp_path, first):
    callbacks = [Throughput(window_size=2), SlowProbe()]
    began = time.perf_counter()
    trainer, _ = fit(tmp_path, callbacks if first else callbacks[::-1])
    lasted = time.perf_counter() - began
    rows = read_run(tmp_path).curves
    probed = 0.3 * (trainer.global_step - 1)  # before the last step's row
    trained = rows["train/time"][-1][1]
    assert 0 < trained < lasted - probed
    assert rows["train/device/batches_per_sec"][-1][1] > trainer.global_step / (lasted - probed) / 2
    assert max(share for _, share in rows["train/data_wait"]) <= 1


PROJECTOR, EVERYTHING = (Part("projector", 1e-3),), (Part("projector", 1e-3), Part("llm", 1e-3))


@pytest.mark.parametrize(
    "text", [None, MixtralConfig(hidden_size=32, intermediate_size=8, num_hidden_layers=2, vocab_size=64)]
)
def test_equals_what_training_allocates(text):
    """Weights, gradients and both moments of AdamW, counted after a step."""
    vlm = tiny_llava(text=text)
    for stages in ([Stage(PROJECTOR)], [Stage(PROJECTOR, steps=1), Stage(EVERYTHING)]):
        memory = training_memory(vlm, stages)
        learning = [
            p
            for name, p in vlm.named_parameters()
            if "projector" in name or (len(stages) > 1 and "vision_tower" not in name)
        ]
        optimizer = torch.optim.AdamW(learning)
        for parameter in learning:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        assert memory.weights == sum(p.nbytes for p in vlm.parameters())
        assert memory.gradients == sum(p.grad.nbytes for p in learning)
        assert memory.optimizer == sum(moment.nbytes for moment in moments)


@pytest.mark.parametrize(
    ("train", "shards", "gigabytes"), [(PROJECTOR, 1, 28.5), (EVERYTHING, 1, 109.4), (EVERYTHING, 8, 13.7)]
)
def test_a_7b_as_the_docs_say(train, shards, gigabytes):
    memory = training_memory(llava_7b(), [Stage(train)], shards)
    assert f"{sum(memory) / 1e9:.1f}" == f"{gigabytes}"
    assert str(memory).startswith(f"{gigabytes} GB a device: weights")
