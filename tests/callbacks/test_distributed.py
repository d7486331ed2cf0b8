"""Two gloo processes: the number of the whole probe, on every rank, under DDP and FSDP2."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from mir_lightning import MIRCallback, Probe, evaluate_mir
from tests.distributed import run_on_ranks
from tests.models import tiny_batch, tiny_llava
from tests.training import Pretraining, fit, strategy_of, trainer_of


class Sharded(Pretraining):
    """FSDP2 as Lightning documents it: each layer, then the model."""

    def configure_model(self):
        for layer in self.vlm.model.language_model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.vlm, mesh=self.device_mesh["data_parallel"])


class Holder(torch.nn.Module):
    """Not of Hugging Face; it is what is sharded, so that the model in it cannot be called itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)


class ShardedHolder(Pretraining):
    def __init__(self):
        super().__init__()
        self.vlm = Holder(self.vlm)

    def configure_model(self):
        fully_shard(self.vlm, mesh=self.device_mesh["data_parallel"])


def _batches(count):
    """Batches of different sizes."""
    return [tiny_batch(seed=100 + s, batch=2 + s % 3) for s in range(count)]


def _train(rank, world, kind, batches, folder, precision="32-true"):
    pl.seed_everything(0, verbose=False)
    module = {"ddp": Pretraining, "fsdp2": Sharded, "fsdp2 around": ShardedHolder}[kind]()
    strategy = strategy_of(kind, world)
    callback = MIRCallback(Probe(_batches(batches)), every_n_steps=2, on_error="raise")
    trainer = trainer_of(rank, world, strategy, callback, folder, precision=precision)
    start = tiny_llava(dropout=0.1).eval() if precision == "32-true" else None
    trainer.fit(module)
    return {
        "history": [(point["step"], point["mir"], point["mir_probe/loss"]) for point in callback.history],
        "metric": trainer.callback_metrics["mir"].item(),
        "start": start and evaluate_mir(start, Probe(_batches(batches))).mir,
    }


@pytest.mark.parametrize(
    ("kind", "batches", "precision"),
    [
        ("ddp", 3, "32-true"),
        ("ddp", 1, "32-true"),
        ("fsdp2", 3, "32-true"),
        ("fsdp2", 1, "32-true"),
        ("fsdp2 around", 3, "32-true"),
        ("fsdp2", 3, "bf16-mixed"),
        ("fsdp2", 2, "bf16-true"),
    ],
)
def test_ranks_see_the_number_of_the_whole_probe(tmp_path, kind, batches, precision):
    """An uneven share (3 batches), fewer batches than ranks (1), and FSDP2's precisions."""
    first, second = run_on_ranks(_train, 2, kind, batches, str(tmp_path), precision)
    assert [step for step, _, _ in first["history"]] == [0, 2, 4]
    assert first["history"] == second["history"]
    assert first["metric"] == second["metric"] == pytest.approx(first["history"][-1][1], rel=1e-6)
    if precision == "32-true":
        assert first["history"][0][1] == pytest.approx(first["start"], rel=1e-6)


def _plain(rank, world, kind, folder, seen):
    pl.seed_everything(0, verbose=False)
    module = {"ddp": Pretraining, "fsdp2": Sharded, "fsdp2 around": ShardedHolder}[kind]()
    strategy = strategy_of(kind, world)
    callback = MIRCallback(Probe(_batches(3)), every_n_steps=2, on_error="raise") if seen else pl.Callback()
    trainer_of(rank, world, strategy, callback, folder).fit(module)
    full = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters())
    return [p.detach().clone() for p in full], torch.get_rng_state()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_distributed_training_is_the_same_bit_for_bit(tmp_path, kind):
    plain, seen = (run_on_ranks(_plain, 2, kind, str(tmp_path), s) for s in (False, True))
    for (weights, rng), (seen_weights, seen_rng) in zip(plain, seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights, seen_weights, strict=True))
        assert torch.equal(rng, seen_rng)


def _one_bad_rank(rank, world, folder, kind):
    """The batch of rank 1 makes hidden states that are not finite."""
    pl.seed_everything(0, verbose=False)
    batches = _batches(2)
    batches[1]["pixel_values"][:] = torch.nan
    module = {"ddp": Pretraining, "fsdp2": Sharded, "fsdp2 around": ShardedHolder}[kind]()
    strategy = strategy_of(kind, world)
    callback = MIRCallback(Probe(batches), every_n_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_of(rank, world, strategy, callback, folder)
        trainer.fit(module)
    failures = [str(w.message) for w in caught if "MIR evaluation at step" in str(w.message)]
    return trainer.global_step, len(callback.history), failures


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_bad_batch_on_one_rank_is_skipped_by_all_and_told_once(tmp_path, kind):
    first, second = run_on_ranks(_one_bad_rank, 2, str(tmp_path), kind)
    assert first[:2] == second[:2] == (4, 0)
    assert len(first[2]) == 1
    assert "hold NaN or inf" in first[2][0]


def _different_probes(rank, world, folder):
    callback = MIRCallback(Probe([tiny_batch(seed=rank)]))
    with pytest.raises(ValueError, match="the ranks hold probes of different contents"):
        trainer_of(rank, world, strategy_of("ddp", world), callback, folder).fit(Pretraining())
    return True


def test_ranks_with_different_probes(tmp_path):
    assert run_on_ranks(_different_probes, 2, str(tmp_path)) == [True, True]


def _tensor_parallel(rank, world, folder):
    callback = MIRCallback(Probe(_batches(2)))
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=world)
    with pytest.raises(ValueError, match="does not support tensor parallelism: 2 ranks hold 1 data-parallel"):
        trainer_of(rank, world, strategy, callback, folder).fit(TensorParallel())
    return True


class TensorParallel(Pretraining):
    def configure_model(self):
        pass


def test_tensor_parallelism_is_refused(tmp_path):
    assert run_on_ranks(_tensor_parallel, 2, str(tmp_path)) == [True, True]


class _Out(pl.Callback):
    """Lets the processes of ``ddp_spawn`` report."""

    def __init__(self, folder, callback):
        self.folder, self.callback = folder, callback

    def on_train_end(self, trainer, pl_module):
        path = self.folder / f"{trainer.global_rank}.pt"
        torch.save([(p["step"], p["mir"]) for p in self.callback.history], path)


class BuiltInTheProcess(Pretraining):
    """transformers keeps a registry that models unpickled in a fresh process miss: build them there."""

    def __init__(self):
        pl.LightningModule.__init__(self)

    def configure_model(self):
        self.vlm = tiny_llava(dropout=0.1)


@pytest.mark.slow
def test_ddp_spawn(tmp_path):
    callback = MIRCallback(Probe(_batches(3)), every_n_steps=2, at_end=False)
    trainer, _ = fit(
        tmp_path,
        [callback, _Out(tmp_path, callback)],
        BuiltInTheProcess(),
        devices=2,
        strategy="ddp_spawn_find_unused_parameters_true",
        max_steps=2,
        logger=False,
        use_distributed_sampler=False,
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert [step for step, _ in first] == [0, 2]
    start = tiny_llava(dropout=0.1)
    assert first[0][1] == pytest.approx(evaluate_mir(start, Probe(_batches(3))).mir, rel=1e-6)
    assert trainer.callback_metrics["mir"].item() == pytest.approx(first[1][1], rel=1e-6)
