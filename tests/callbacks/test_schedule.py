from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.tuner import Tuner

from mir_lightning import MIRCallback, Probe
from mir_lightning.callbacks.schedule import Schedule, tokens_of
from tests.models import tiny_batch
from tests.training import Manual, Pretraining, fit


@pytest.fixture
def probe():
    return Probe([tiny_batch(seed=100)])


def test_geometric_points_grow_by_the_factor():
    steps = [step for step in range(1, 5000) if Schedule(growth=2.0).due_at_step(step)]
    assert steps == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    steps = [step for step in range(1, 5000) if Schedule(growth=1.2).due_at_step(step)]
    assert steps[:5] == [1, 2, 3, 4, 5]
    assert all(b <= 1.2 * a + 1 for a, b in pairwise(steps))
    assert len(steps) < 50


def test_schedules_add_up():
    schedule = Schedule(every_n_steps=10, at_steps=(3, 7))
    assert [step for step in range(1, 25) if schedule.due_at_step(step)] == [3, 7, 10, 20]
    assert not Schedule().due_at_step(500)


def _steps(folder, callback, **options):
    fit(folder, [callback], **options)
    return [point["step"] for point in callback.history]


def test_single_steps_and_growth_in_a_run(tmp_path, probe):
    quiet = {"every_n_steps": None, "at_start": False, "at_end": False}
    assert _steps(tmp_path, MIRCallback(probe, **quiet, at_steps=[1, 5])) == [1, 5]
    assert _steps(tmp_path, MIRCallback(probe, **quiet, growth=2)) == [1, 2, 4]


def test_epochs_in_a_run(tmp_path, probe):
    callback = MIRCallback(probe, every_n_steps=None, every_n_epochs=2, at_start=False, at_end=False)
    assert _steps(tmp_path, callback, max_steps=-1, max_epochs=5) == [16, 32]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tokens_in_a_run(tmp_path, probe, accumulate):
    """A batch of the tiny run holds 4 x 19 - 2 = 74 tokens that are not padding."""
    callback = MIRCallback(probe, every_n_steps=None, every_n_tokens=150, at_start=False, at_end=False)
    steps = _steps(tmp_path, callback, max_steps=6, accumulate_grad_batches=accumulate)
    trained = [74 * accumulate * step for step in range(7)]
    assert steps == [s for s in range(1, 7) if trained[s] // 150 > trained[s - 1] // 150]
    assert callback._tokens == trained[6]


def test_tokens_of_a_batch_that_shows_none():
    assert tokens_of({"input_ids": torch.zeros(2, 5)}) == 10
    with pytest.raises(ValueError, match=r'"attention_mask" or "input_ids" of training batches, got \[\'x\'\]'):
        tokens_of({"x": torch.zeros(2)})


def test_max_overhead_leaves_points_out_and_the_share_is_logged(tmp_path, probe, caplog):
    dear = MIRCallback(probe, every_n_steps=1, max_overhead=1e-6)
    with caplog.at_level("INFO"):
        assert _steps(tmp_path, dear) == [0, 6]
    assert "evaluation at step 1 left out: with it, evaluations would have taken" in caplog.text
    assert _steps(tmp_path, MIRCallback(probe, every_n_steps=1, max_overhead=1.0)) == list(range(7))


def test_two_optimizers_pass_over_a_point_and_it_is_taken(tmp_path, probe):
    callback = MIRCallback(probe, every_n_steps=3, at_start=False, at_end=False)
    fit(tmp_path, [callback], Manual(), max_steps=12)
    assert [point["step"] for point in callback.history] == [4, 6, 10, 12]


class Validating(Pretraining):
    def validation_step(self, batch, batch_idx):
        self.log("loss", self.vlm(**batch).loss)

    val_dataloader = Pretraining.train_dataloader


def test_trainer_modes(tmp_path, probe):
    callback = MIRCallback(probe, every_n_steps=2)
    trainer, module = fit(tmp_path, [callback], Validating(), fast_dev_run=True, max_steps=-1)
    assert [point["step"] for point in callback.history] == [0, 1]
    trainer.validate(module, torch.utils.data.DataLoader([tiny_batch()], batch_size=None), verbose=False)
    assert len(callback.history) == 2
    overfit = MIRCallback(probe, every_n_steps=2)
    assert _steps(tmp_path, overfit, overfit_batches=1, max_epochs=3, max_steps=-1) == [0, 2, 3]
    limited = MIRCallback(probe, every_n_steps=2)
    assert _steps(tmp_path, limited, limit_train_batches=3, max_epochs=1, max_steps=-1) == [0, 2, 3]


def test_sanity_checks_and_the_tuner_do_not_count(tmp_path, probe):
    callback = MIRCallback(probe, every_n_steps=3)
    trainer, module = fit(tmp_path, [callback], Validating())
    assert [point["step"] for point in callback.history] == [0, 3, 6]
    module.lr = 1e-3
    callback = MIRCallback(probe, every_n_steps=3)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=4,
        callbacks=[callback],
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    Tuner(trainer).lr_find(module, num_training=5)
    assert callback.history == []
    trainer.fit(module)
    assert [point["step"] for point in callback.history] == [0, 3, 4]
