"""Two gloo processes: DDP and FSDP2 train MoCa to what one process makes of the whole batch."""

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mir_lightning.moca import inject_moca, moca_parameters, moca_statistics, remove_moca, save_moca
from mir_lightning.moca.inject import whole
from tests.distributed import run_on_ranks
from tests.moca.families import build, lay_out, layers_of
from tests.models import tiny_llava

# By rank: equally many tokens, and only rank 0 has an image in the second step.
STEPS = [(["tIttIt"], ["ItttIt"]), (["ttIttt"], ["t" * 15]), (["tIt"], ["ttI"])]
KINDS = ["ddp", "fsdp2", "fsdp2 checkpointing", "fsdp2 bf16", "bf16 model"]


def _batch(rows):
    inputs, _ = lay_out("llava", rows)
    return {**inputs, "labels": torch.where(inputs["input_ids"] == 3, -100, inputs["input_ids"])}


def _fit(model, batches, scale=1.0):
    """Only MoCa learns, as the paper's first stage would have it; the model is eval, so nothing is random."""
    optimizer = torch.optim.AdamW(moca_parameters(model), lr=0.05, weight_decay=0.0)
    losses = []
    for parts in batches:
        for batch in parts:
            loss = model(**batch, use_cache=False).loss * scale
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _train(kind, rank, world, folder):
    model, _ = build("llava")
    if kind == "bf16 model":
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data if ".moca." in name else parameter.data.bfloat16()
    model.requires_grad_(False)
    for parameter in moca_parameters(model):
        parameter.requires_grad_(True)
    if kind == "fsdp2 checkpointing":
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [[_batch(rows[rank])] for rows in STEPS]
    if kind == "ddp":
        _fit(DistributedDataParallel(model), batches)
    else:
        mesh = init_device_mesh("cpu", (world,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if "bf16" in kind else None)
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        _fit(model, batches)
        with pytest.raises(ValueError, match="out of a sharded model it cannot be taken"):
            remove_moca(model)
    file = folder / f"{kind} {rank}.safetensors"
    save_moca(model, file)
    return [whole(p).cpu() for p in moca_parameters(model)], moca_statistics(model), file.read_bytes()


def _inject_too_late(world):
    model = tiny_llava()
    fully_shard(layers_of(model)[0], mesh=init_device_mesh("cpu", (world,)))
    with pytest.raises(ValueError, match=r"sharded, compiled or dispatched .* \(FSDPLlamaDecoderLayer\): inject"):
        inject_moca(model)
    with pytest.raises(ValueError, match="model is wrapped in DistributedDataParallel"):
        inject_moca(DistributedDataParallel(tiny_llava()))


def _everything(rank, world, folder):
    """Starting processes takes much longer than what they do."""
    _inject_too_late(world)
    return {kind: _train(kind, rank, world, Path(folder)) for kind in KINDS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run_on_ranks(_everything, 2, str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_train_what_one_process_trains(trained, kind):
    (first, statistics, file), (second, *others) = (results[kind] for results in trained)
    assert all(map(torch.equal, first, second))
    assert [statistics, file] == others
    single, _ = build("llava")
    _fit(single, [[_batch(rows[0]), _batch(rows[1])] for rows in STEPS], scale=0.5)
    start, _ = build("llava")
    for ours, alone, before in zip(first, moca_parameters(single), moca_parameters(start), strict=True):
        assert (alone - before).abs().max() > 0.05
        tolerance = 0.15 if "bf16" in kind else 1e-4  # Adam makes much of the sign of a small gradient
        torch.testing.assert_close(ours, alone.detach(), rtol=0, atol=tolerance)
        assert ((ours - alone).abs() < 0.01).float().mean() > 0.8
