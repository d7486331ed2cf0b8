"""A sharded model with every part, gathered: the model it was, on the first rank."""

import torch
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh

from mir_lightning.llava.demo.weights import build_packaged_processor
from mir_lightning.llava.model.saving import export, gathered, load_vlm
from mir_lightning.llava.model.sharding import shard
from mir_lightning.moca import inject_moca
from tests.distributed import run_on_ranks
from tests.models import tiny_batch, tiny_llava


def _with_every_part():
    vlm = tiny_llava()
    inject_moca(vlm)
    vlm.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    torch.manual_seed(3)
    for name, parameter in vlm.named_parameters():
        if ".moca." in name or ".lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return vlm.eval()


def _gather(rank, world, folder):
    vlm = _with_every_part()
    shard(vlm, init_device_mesh("cpu", (world,)))
    whole = gathered(vlm)
    if rank:
        return whole
    export(whole, build_packaged_processor(), folder / "model")
    return {name: parameter.detach() for name, parameter in whole.named_parameters()}


def test_the_gathered_model_is_the_one_that_was_sharded(tmp_path):
    vlm = _with_every_part()
    gathered_state, nothing = run_on_ranks(_gather, 2, tmp_path)
    assert nothing is None
    own = dict(vlm.named_parameters())
    assert gathered_state.keys() == own.keys()
    assert all(torch.equal(gathered_state[name], own[name]) for name in own)
    batch = tiny_batch(labels=False)
    with torch.no_grad():
        expected = vlm(**batch).logits
        torch.testing.assert_close(load_vlm(str(tmp_path / "model")).eval()(**batch).logits, expected)
    assert gathered(vlm) is vlm
