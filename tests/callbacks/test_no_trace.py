"""With the callback or without: the same run, bit for bit, under every way of training."""

import random

import lightning.pytorch as pl
import numpy as np
import peft
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler

from mir_lightning import MIRCallback, Probe
from tests.models import tiny_batch
from tests.training import Manual, Pretraining, fit, logged_rows


class Checkpointing(Pretraining):
    def __init__(self):
        super().__init__()
        self.vlm.gradient_checkpointing_enable({"use_reentrant": False})


class CompiledModel(Pretraining):
    def __init__(self):
        super().__init__()
        self.vlm = torch.compile(self.vlm, backend="aot_eager")


class CompiledLayers(Pretraining):
    def __init__(self):
        super().__init__()
        for layer in self.vlm.model.language_model.layers:
            layer.compile(backend="aot_eager")


class Lora(Pretraining):
    def __init__(self):
        super().__init__()
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=0.3)
        self.vlm = peft.get_peft_model(self.vlm, config)


class Scheduled(Pretraining):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Frozen(Pretraining):
    """The vision tower is frozen and stays in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.vlm.model.vision_tower.requires_grad_(False)


def _nothing():
    return []


WAYS = {
    "plain": (Pretraining, {}, _nothing),
    "accumulation with a partial last window": (
        Pretraining,
        {"accumulate_grad_batches": 3, "max_steps": 5, "max_epochs": 3},
        _nothing,
    ),
    "accumulation scheduler": (Pretraining, {}, lambda: [GradientAccumulationScheduler({0: 2})]),
    "clipping": (Pretraining, {"gradient_clip_val": 0.05}, _nothing),
    "gradient checkpointing": (Checkpointing, {}, _nothing),
    "bf16-mixed": (Pretraining, {"precision": "bf16-mixed"}, _nothing),
    "bf16-true": (Pretraining, {"precision": "bf16-true"}, _nothing),
    "manual": (Manual, {}, _nothing),
    "frozen": (Frozen, {}, _nothing),
    "compiled model": (CompiledModel, {}, _nothing),
    "compiled layers": (CompiledLayers, {}, _nothing),
    "lora": (Lora, {}, _nothing),
    "scheduler": (Scheduled, {}, _nothing),
    "weight averaging": (Pretraining, {}, lambda: [EMAWeightAveraging(decay=0.9)]),
}


class Trouble(pl.Callback):
    """Makes every evaluation from step 2 on raise in the middle of the forward."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 2 and not hasattr(self, "handle"):
            decoder = next(m for n, m in pl_module.named_modules() if n.endswith("language_model"))
            self.handle = decoder.layers[1].register_forward_pre_hook(self._raise_without_gradients)

    @staticmethod
    def _raise_without_gradients(module, arguments):
        if not torch.is_grad_enabled():
            raise RuntimeError("trouble in the middle")


def _run(folder, way, extra):
    module, options, callbacks = WAYS[way]
    torch._dynamo.reset()
    trainer, module = fit(folder, [*extra, *callbacks()], module(), **options)
    states = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return {
        "weights": module.state_dict(),
        "optimizers": [s["state"] for s in states],
        "groups": [[{k: v for k, v in g.items() if k != "params"} for g in s["param_groups"]] for s in states],
        "rng": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),
        "modes": {name: m.training for name, m in module.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "hooks": {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in module.named_modules()},
        "autograd": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "rows": [(r["step"], r["train/loss"]) for r in logged_rows(trainer) if r.get("train/loss")],
        "steps": trainer.global_step,
    }


def _assert_same(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            _assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            _assert_same(*pair, f"{where}/{index}")
    else:
        assert a == b, where


@pytest.mark.filterwarnings("ignore:MIR evaluation at step")
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow) if way == "compiled model" else way for way in WAYS]
)
def test_the_run_is_the_same_bit_for_bit(tmp_path, way):
    probe = Probe([tiny_batch(seed=100 + s) for s in range(2)])
    plain = _run(tmp_path / "plain", way, [])
    callback = MIRCallback(probe, every_n_steps=2, on_error="raise")
    _assert_same(plain, _run(tmp_path / "seen", way, [callback]))
    assert [point["step"] for point in callback.history][:2] == [0, 2]
    assert len(plain["rows"]) >= 5 or way == "manual"
    if way != "compiled layers":  # a hook added to a compiled layer is not seen
        troubled = MIRCallback(probe, every_n_steps=2)
        trouble = Trouble()
        again = _run(tmp_path / "troubled", way, [trouble, troubled])
        again["hooks"] = {n: k - (n == _hooked(trouble, again)) for n, k in again["hooks"].items()}
        assert [point["step"] for point in troubled.history] == [0]
        _assert_same(plain, again)


def _hooked(trouble, state):
    return next(name for name in state["hooks"] if name.endswith("language_model.layers.1"))


@pytest.mark.parametrize("averaging_first", [False, True])
def test_the_last_point_is_of_trained_weights_whatever_averages_them(tmp_path, averaging_first):
    probe = Probe([tiny_batch(seed=100)])
    alone = MIRCallback(probe, every_n_steps=2)
    fit(tmp_path / "alone", [alone])
    callback, averaging = MIRCallback(probe, every_n_steps=2), EMAWeightAveraging(decay=0.9)
    fit(tmp_path / "averaged", [averaging, callback] if averaging_first else [callback, averaging])
    assert [point["mir"] for point in callback.history] == [point["mir"] for point in alone.history]
