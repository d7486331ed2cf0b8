from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from torch.distributed.fsdp import fully_shard

from mir_lightning import MIRCallback, Probe, SDSCallback
from mir_lightning.probing import ChoiceProbe, evaluate_choices
from tests.distributed import run_on_ranks
from tests.items import hard_items
from tests.processors import build
from tests.training import Captioning, assert_same_run, caption_batches, fit, logged_rows, strategy_of, trainer_of
from tests.wandb_offline import read_offline_run


@pytest.fixture
def items():
    return ChoiceProbe(hard_items(), build("llava")[1])


def test_logs_the_numbers_of_evaluate_choices_under_the_documented_names(tmp_path, items):
    callback = SDSCallback(items, every_n_steps=4, score="logprob", batch_size=5)
    trainer, module = fit(tmp_path, [callback], Captioning())
    rows = [row for row in logged_rows(trainer) if row["sds"]]
    assert [int(row["step"]) for row in rows] == [point["step"] for point in callback.history] == [0, 4, 6]
    result = evaluate_choices(module.vlm, items, "logprob")
    expected = {"sds": result.sds, "sds_acc": result.accuracy, "sds_chance": result.chance}
    assert set(result.breakdown) == {"", "perception", "perception/colour", "reasoning", "reasoning/relation"}
    for path in ("perception", "perception/colour", "reasoning", "reasoning/relation"):
        found = result.breakdown[path]
        level = ("abilities", "tasks", "parts")[path.count("/")]
        expected |= {
            f"sds_{level}/{path}": found.sds,
            f"sds_acc_{level}/{path}": found.accuracy,
            f"sds_chance_{level}/{path}": found.chance,
        }
    for name, value in expected.items():
        assert float(rows[-1][name]) == pytest.approx(value, abs=1e-6), name
        assert trainer.callback_metrics[name].item() == pytest.approx(value, abs=1e-6), name
    assert result.chance == pytest.approx((4 / 2 + 3 / 3) / 7)
    assert float(rows[-1]["sds_probe/seconds"]) > 0
    assert 0 < float(rows[-1]["sds_probe/overhead"]) < 1
    assert rows[0]["sds"] != rows[-1]["sds"]


def test_every_logger_gets_what_it_can_show(tmp_path, items):
    loggers = [
        CSVLogger(tmp_path),
        TensorBoardLogger(tmp_path),
        WandbLogger(project="test", save_dir=tmp_path, offline=True),
    ]
    fit(tmp_path, [SDSCallback(items, every_n_steps=3)], Captioning(), logger=loggers)
    assert Image.open(Path(loggers[0].log_dir) / "sds_media" / "abilities.png").size == (768, 432)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(loggers[1].log_dir).Reload()
    assert [scalar.step for scalar in events.Scalars("sds_abilities/perception")] == [0, 3, 6]
    assert len(events.Images("sds_media/abilities")) == 3

    history, media, config = read_offline_run(loggers[2])
    assert config["sds"] == {"score": "logit", "fingerprint": items.fingerprint}
    rows = [row for row in history if "sds" in row]
    assert [row["trainer/global_step"] for row in rows] == [0, 3, 6]
    assert all("sds_acc_tasks/reasoning/relation" in row for row in rows)
    assert len(list((media / "images" / "sds_media").glob("abilities*.png"))) == 3


def test_checkpoints_are_kept_by_the_score_and_a_resume_continues_the_curve(tmp_path, items):
    callback = SDSCallback(items, every_n_steps=2)
    keeper = ModelCheckpoint(
        tmp_path, "{step}-{sds:.6f}", monitor="sds", mode="max", every_n_train_steps=2, save_top_k=-1
    )
    fit(tmp_path, [callback, keeper], Captioning(), max_steps=4, enable_checkpointing=True)
    by_step = {point["step"]: point["sds"] for point in callback.history}
    for step in (2, 4):
        (path,) = tmp_path.glob(f"step={step}-*.ckpt")
        assert float(path.stem.split("sds=")[1]) == pytest.approx(by_step[step], abs=1e-6)
    other = ChoiceProbe(hard_items()[:3], build("llava")[1])
    for probe, outcome in (
        (items, nullcontext()),
        (other, pytest.warns(UserWarning, match="points of the sds curve before")),
    ):
        resumed = SDSCallback(probe, every_n_steps=2)
        with outcome:
            fit(tmp_path, [resumed], Captioning(), path, logger=False)
        assert [point["step"] for point in resumed.history] == [0, 2, 4, 6]
        assert resumed.history[:3] == callback.history


def test_the_run_is_the_same_bit_for_bit_and_beside_mir(tmp_path, items):
    plain = fit(tmp_path / "plain", [], Captioning())
    rng = torch.get_rng_state()
    mir = MIRCallback(Probe(caption_batches(items.processor)[:2]), every_n_steps=3, on_error="raise")
    sds = SDSCallback(lambda: items, every_n_steps=2, on_error="raise", model="vlm")
    assert_same_run(plain, fit(tmp_path / "seen", [mir, sds], Captioning()))
    assert torch.equal(torch.get_rng_state(), rng)
    assert [point["step"] for point in sds.history] == [0, 2, 4, 6]
    assert sds.state_key != mir.state_key


class TroubleFromStep2(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 2:
            layer = pl_module.vlm.model.language_model.layers[1]
            layer.register_forward_hook(lambda m, a, out: out if torch.is_grad_enabled() else out * torch.nan)


def test_a_failed_evaluation_warns_once_and_training_goes_on_unchanged(tmp_path, items):
    plain = fit(tmp_path / "plain", [], Captioning())
    callback = SDSCallback(items, every_n_steps=2)
    with pytest.warns(UserWarning, match="SDS evaluation at step 2 failed.*scores of item one hold NaN") as caught:
        seen = fit(tmp_path / "seen", [TroubleFromStep2(), callback], Captioning())
    assert sum("SDS evaluation" in str(w.message) for w in caught) == 1
    assert [point["step"] for point in callback.history] == [0]
    assert_same_run(plain, seen)
    with pytest.raises(ValueError, match="scores of item one hold NaN or inf"):
        fit(tmp_path, [TroubleFromStep2(), SDSCallback(items, every_n_steps=2, on_error="raise")], Captioning())


def test_two_sets_of_items_keep_their_names_apart(tmp_path, items):
    other = ChoiceProbe(hard_items()[:2], items.processor)
    trainer, _ = fit(tmp_path, [SDSCallback(items, 3), SDSCallback(other, 3, name="docs")], Captioning())
    last = [row for row in logged_rows(trainer) if row["docs"]][-1]
    assert last["docs_acc_abilities/perception"]
    assert last["docs_chance"]
    assert (Path(trainer.logger.log_dir) / "docs_media" / "abilities.png").exists()


def test_bad_options(tmp_path, items):
    for options, message in (
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"score": "loss"}, "score must be one of logit, logprob, got 'loss'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"on_error": "ignore"}, "on_error must be one of warn, raise"),
        ({"max_overhead": 2}, "max_overhead must lie above 0 and up to 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            SDSCallback(items, **options)
    with pytest.raises(TypeError, match="items must be a ChoiceProbe or a callable that makes one, got list"):
        fit(tmp_path, [SDSCallback(hard_items())], Captioning())


class Sharded(Captioning):
    def configure_model(self):
        for layer in self.vlm.model.language_model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.vlm, mesh=self.device_mesh["data_parallel"])


def _train(rank, world, folder):
    found = []
    for kind, module_class in (("ddp", Captioning), ("fsdp2", Sharded)):
        pl.seed_everything(0, verbose=False)
        module = module_class()
        items = ChoiceProbe(hard_items(), module.processor)
        start = evaluate_choices(module.vlm, items) if kind == "ddp" else None
        callback = SDSCallback(items, every_n_steps=2, batch_size=5, on_error="raise")
        trainer = trainer_of(rank, world, strategy_of(kind, world), callback, folder)
        trainer.fit(module)
        history = [(point["step"], point["sds"], point["sds_acc"]) for point in callback.history]
        assert all(point["shared_prefix"] for point in callback.history)
        found.append((history, start and start.sds, trainer.callback_metrics["sds_abilities/reasoning"].item()))
    return found


def test_ranks_see_the_numbers_of_all_items(tmp_path):
    """Seven items in uneven batches on two ranks, under DDP and FSDP2."""
    first, second = run_on_ranks(_train, 2, str(tmp_path))
    (_, start, _), _ = first
    for mine, others in zip(first, second, strict=True):
        assert mine[0] == others[0]
        assert mine[2] == others[2]
        assert [step for step, _, _ in mine[0]] == [0, 2, 4]
        assert mine[0][0][1] == pytest.approx(start, abs=1e-5)


def test_names_that_would_be_each_others_folders_are_refused_at_the_start(tmp_path):
    _, processor = build("llava")
    for task, ability, message in (
        ("a/b/c", "perception", "task 'a/b/c' one at most"),
        ("a", "per/ception", "ability 'per/ception' must hold no"),
    ):
        items = ChoiceProbe([replace(hard_items()[0], task=task, ability=ability)], processor)
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, [SDSCallback(items)], Captioning())
    both = [replace(hard_items()[0], task="a"), replace(hard_items()[1], task="a/b")]
    with pytest.raises(ValueError, match="'a' has parts"):
        fit(tmp_path, [SDSCallback(ChoiceProbe(both, processor))], Captioning())


def test_a_users_own_accuracy_is_left_alone(tmp_path, items):
    class Own(Captioning):
        def training_step(self, batch, batch_idx):
            self.log("acc", 0.9)
            return super().training_step(batch, batch_idx)

    trainer, _ = fit(tmp_path, [SDSCallback(items, every_n_steps=3)], Own())
    assert trainer.callback_metrics["acc"].item() == pytest.approx(0.9)
    names = [name for name in logged_rows(trainer)[0] if name.startswith("sds")]
    assert not [a for a in names for b in names if b.startswith(f"{a}/")], "no name is the folder of another"
