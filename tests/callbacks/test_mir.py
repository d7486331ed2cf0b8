import csv
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from torch.utils.data import DataLoader

from mir_lightning import MIRCallback, Probe, evaluate_mir
from mir_lightning.functional import modality_integration_rate
from tests.models import IMAGE_TOKEN, tiny_batch, tiny_llava
from tests.training import Pretraining, assert_same_run, fit, logged_rows
from tests.wandb_offline import read_offline_run


@pytest.fixture
def probe():
    return Probe([tiny_batch(seed=100 + s) for s in range(2)])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_fires_at_start_every_n_optimizer_steps_and_at_the_end_once_each(tmp_path, probe, accumulate):
    callback = MIRCallback(probe, every_n_steps=2)
    trainer, _ = fit(tmp_path, [callback], max_steps=5, accumulate_grad_batches=accumulate)
    assert [point["step"] for point in callback.history] == [0, 2, 4, 5]
    assert [int(row["step"]) for row in logged_rows(trainer) if row["mir"]] == [0, 2, 4, 5]
    quiet = MIRCallback(probe, every_n_steps=2, at_start=False, at_end=False)
    fit(tmp_path, [quiet], max_steps=5, accumulate_grad_batches=accumulate)
    assert [point["step"] for point in quiet.history] == [2, 4]


def test_logs_the_numbers_of_evaluate_mir_under_the_documented_names(tmp_path, probe):
    trainer, module = fit(tmp_path, [MIRCallback(probe, every_n_steps=4)])
    last = [row for row in logged_rows(trainer) if row["mir"]][-1]
    result = evaluate_mir(module.vlm, probe)
    assert float(last["mir"]) == pytest.approx(result.mir, rel=1e-6)
    assert trainer.callback_metrics["mir"].item() == pytest.approx(result.mir, rel=1e-6)
    for layer in range(3):
        assert float(last[f"mir_layers/layer_0{layer + 1}"]) == pytest.approx(
            result.layers[layer].item(), rel=1e-6
        )
    for column, value in (
        ("mir_probe/loss", result.loss),
        ("mir_probe/perplexity", result.perplexity),
        ("mir_equal_norm", result.mir_equal_norm),
        ("mir_gap/mean", result.mean_gap.sum().item()),
        ("mir_gap/covariance", result.cov_gap.sum().item()),
        ("mir_norm/mean", result.norm_ratio.mean().item()),
        ("mir_norm/layer_02", result.norm_ratio[1].item()),
        ("mir_rank/vision", result.effective_rank[:, 0].mean().item()),
        ("mir_rank/text", result.effective_rank[:, 1].mean().item()),
    ):
        assert float(last[column]) == pytest.approx(value, rel=1e-5)
    assert float(last["mir_probe/seconds"]) > 0


def test_every_logger_gets_what_it_can_show(tmp_path, probe):
    loggers = [
        CSVLogger(tmp_path),
        TensorBoardLogger(tmp_path),
        WandbLogger(project="test", save_dir=tmp_path, offline=True),
    ]
    trainer, _ = fit(tmp_path, [MIRCallback(probe, every_n_steps=3)], logger=loggers)
    pictures = Path(loggers[0].log_dir) / "mir_media"
    for name in ("layers.png", "heatmap.png", "tokens.png"):
        assert Image.open(pictures / name).size == (768, 432)
    assert Image.open(pictures / "overview.png").size == (1320, 432)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(loggers[1].log_dir).Reload()
    assert [scalar.step for scalar in events.Scalars("mir")] == [0, 3, 6]
    assert len(events.Images("mir_media/heatmap")) == 3

    history, media, config = read_offline_run(loggers[2])
    assert config["mir"] == {
        "variant": "paper",
        "text": "after_vision",
        "fingerprint": probe.fingerprint,
        "probe_batches": 2,
    }
    rows = [row for row in history if "mir" in row]
    assert [row["trainer/global_step"] for row in rows] == [0, 3, 6]
    assert all("mir_layers/layer_03" in row for row in rows)
    assert rows[-1]["mir_robust"] == pytest.approx(trainer.callback_metrics["mir_robust"].item(), rel=1e-6)
    assert all(0 <= row[f"mir_massive/{modality}"] < 0.5 for row in rows for modality in ("vision", "text"))
    assert rows[-1]["mir"] == pytest.approx(trainer.callback_metrics["mir"].item(), rel=1e-6)
    for picture in ("layers", "heatmap", "tokens", "table"):
        assert [row["trainer/global_step"] for row in history if f"mir_media/{picture}/_type" in row] == [0, 3, 6]
    table = json.loads(
        max((media / "table" / "mir_media").glob("*.json"), key=lambda p: p.stat().st_mtime).read_text()
    )
    assert table["columns"][:3] == ["step", "layer", "distance"]
    assert [row[:2] for row in table["data"]] == [[6, 1], [6, 2], [6, 3]]
    assert [row[2] for row in table["data"]] == [rows[-1][f"mir_layers/layer_0{layer}"] for layer in (1, 2, 3)]
    assert len(list((media / "images" / "mir_media").glob("heatmap*.png"))) == 3


def test_the_robust_value_can_be_monitored_and_equals_the_variants(tmp_path, probe):
    keeper = ModelCheckpoint(tmp_path / "kept", monitor="mir_robust", every_n_train_steps=3)
    paper, robust = MIRCallback(probe, every_n_steps=3), MIRCallback(probe, 3, variant="robust", name="other")
    trainer, _ = fit(tmp_path, [paper, robust, keeper], enable_checkpointing=True)
    best = min(point["mir_robust"] for point in paper.history[1:])
    assert float(keeper.best_model_score) == pytest.approx(best, rel=1e-6)
    assert [point["mir_robust"] for point in paper.history] == [point["other"] for point in robust.history]
    assert trainer.callback_metrics["other"] == trainer.callback_metrics["mir_robust"]


def test_a_bar_of_each_evaluation_where_the_trainer_shows_bars(tmp_path, probe, capfd):
    fit(tmp_path, [MIRCallback(probe, every_n_steps=3), TQDMProgressBar()], enable_progress_bar=True)
    said = capfd.readouterr().err
    assert all(f"MIR at step {step}:" in said for step in (0, 3, 6))
    fit(tmp_path, [MIRCallback(probe, every_n_steps=3)])
    assert "MIR at step" not in capfd.readouterr().err


def test_pictures_without_a_logger_go_to_the_root_dir(tmp_path, probe):
    fit(tmp_path, [MIRCallback(probe)], logger=False)
    assert (tmp_path / "mir_media" / "layers.png").exists()


class Drawing(MIRCallback):
    """Remembers what it drew."""

    drawn: tuple[int, ...] = ()

    def draw(self, result, step):
        self.drawn += (step,)
        return super().draw(result, step)


@pytest.mark.parametrize(
    ("seconds", "logger", "options", "drawn"),
    [
        (60, False, {}, (6,)),
        (60, False, {"at_end": False, "every_n_steps": 4}, (4,)),
        (0, False, {}, (0, 3, 6)),
        (60, True, {}, (0, 3, 6)),
    ],
)
def test_files_that_nobody_is_shown_are_drawn_once_a_minute(
    tmp_path, probe, monkeypatch, seconds, logger, options, drawn
):
    monkeypatch.setattr("mir_lightning.callbacks.base._SECONDS_OF_FILES", seconds)
    callback = Drawing(probe, **{"every_n_steps": 3, **options})
    fit(tmp_path, [callback], logger=TensorBoardLogger(tmp_path) if logger else False)
    assert callback.drawn == drawn
    assert (tmp_path / "mir_media" / "heatmap.png").exists()


def test_checkpoint_and_early_stopping_see_the_value_of_their_step(tmp_path, probe):
    callback = MIRCallback(probe, every_n_steps=2)
    keeper = ModelCheckpoint(
        tmp_path / "kept", "{step}-{mir:.6f}", monitor="mir", mode="min", every_n_train_steps=2, save_top_k=-1
    )
    fit(tmp_path, [callback, keeper], enable_checkpointing=True)
    by_step = {point["step"]: point["mir"] for point in callback.history}
    kept = sorted((tmp_path / "kept").glob("*.ckpt"))
    assert len(kept) == 3
    for path in kept:
        step, mir = (part.split("=")[1] for part in path.stem.split("-"))
        assert float(mir) == pytest.approx(by_step[int(step)], abs=1e-6)

    stopper = EarlyStopping("mir", mode="min", divergence_threshold=-10.0, check_on_train_epoch_end=True)
    trainer, _ = fit(tmp_path, [MIRCallback(probe, every_n_steps=2), stopper], max_steps=100)
    assert trainer.global_step == 8  # the end of the first epoch


def test_a_resumed_run_shows_its_last_point_until_the_next(tmp_path, probe):
    keeper = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=5, save_top_k=-1)
    first = MIRCallback(probe, every_n_steps=100, at_end=False)
    fit(tmp_path, [first, keeper], max_steps=5, enable_checkpointing=True)
    (checkpoint,) = (tmp_path / "kept").glob("*.ckpt")

    class Seen(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append({name: trainer.callback_metrics[name].item() for name in ("mir", "mir_robust")})

    seen = []
    resumed = MIRCallback(probe, every_n_steps=100, at_end=False)
    stopper = EarlyStopping(
        "mir", mode="min", check_on_train_epoch_end=True
    )  # raises where there is no such value
    fit(tmp_path, [resumed, stopper, Seen()], max_steps=9, ckpt_path=checkpoint)
    point = first.history[0]
    assert seen == [pytest.approx({"mir": point["mir"], "mir_robust": point["mir_robust"]}, rel=1e-6)] * 4


def test_resume_continues_the_curve(tmp_path, probe):
    whole = MIRCallback(probe, every_n_steps=2)
    fit(tmp_path, [whole], max_steps=8)
    first = MIRCallback(probe, every_n_steps=2)
    saver = ModelCheckpoint(tmp_path, "half", every_n_train_steps=4, save_top_k=1)
    fit(tmp_path, [first, saver], max_steps=4, enable_checkpointing=True)
    resumed = MIRCallback(probe, every_n_steps=2)
    steps = _resume(tmp_path, resumed, tmp_path / "half.ckpt")
    assert steps == [point["step"] for point in whole.history]
    assert [p["mir"] for p in resumed.history[:3]] == [p["mir"] for p in whole.history[:3]]


def _resume(folder, callback, checkpoint, max_steps=8):
    fit(folder, [callback], Pretraining(seed=9), checkpoint, max_steps=max_steps, logger=False)
    return [point["step"] for point in callback.history]


def test_resume_neither_repeats_nor_loses_a_point(tmp_path, probe):
    """Checkpoints of step 3, between two points, and of step 4, before its point was taken."""
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, [MIRCallback(probe, every_n_steps=2), saver], max_steps=4, enable_checkpointing=True)
    assert _resume(tmp_path, MIRCallback(probe, every_n_steps=2), tmp_path / "step=3.ckpt") == [0, 2, 4, 6, 8]
    assert _resume(tmp_path, MIRCallback(probe, every_n_steps=2), tmp_path / "step=4.ckpt") == [0, 2, 4, 6, 8]
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("MIRCallback"))
    state = checkpoint["callbacks"][key]
    assert state["history"].pop()["step"] == 4
    state["last_step"] = 2
    torch.save(checkpoint, tmp_path / "early.ckpt")
    assert _resume(tmp_path, MIRCallback(probe, every_n_steps=2), tmp_path / "early.ckpt") == [0, 2, 4, 6, 8]
    state["version"] = 1
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="the checkpoint's mir state has version 1, this one reads 4"):
        _resume(tmp_path, MIRCallback(probe, every_n_steps=2), tmp_path / "old.ckpt")


def test_resume_with_another_probe_is_reported(tmp_path, probe):
    saver = ModelCheckpoint(tmp_path, "half", every_n_train_steps=2)
    fit(tmp_path, [MIRCallback(probe, every_n_steps=2), saver], max_steps=2, enable_checkpointing=True)
    other = Probe([tiny_batch(seed=7)])
    with pytest.warns(UserWarning, match=r"fingerprint .* is not that of the checkpoint.*not comparable"):
        _resume(tmp_path, MIRCallback(other, every_n_steps=2), tmp_path / "half.ckpt", 4)
    with pytest.raises(ValueError, match=r"fingerprint .* is not that of the checkpoint"):
        _resume(tmp_path, MIRCallback(other, strict_probe=True), tmp_path / "half.ckpt", 4)
    assert _resume(tmp_path, MIRCallback(probe, 2, strict_probe=True), tmp_path / "half.ckpt", 4) == [0, 2, 4]


class BrokenLogger(CSVLogger):
    def log_metrics(self, metrics, step=None):
        if "mir" in metrics:
            raise OSError("no space left on device")
        super().log_metrics(metrics, step)


def test_a_logger_that_raises_loses_nothing_elsewhere(tmp_path, probe):
    _, plain = fit(tmp_path / "plain")
    loggers = [BrokenLogger(tmp_path / "broken"), CSVLogger(tmp_path / "whole")]
    callback = MIRCallback(probe, every_n_steps=3)
    with pytest.warns(UserWarning, match="MIR of step 0 could not be logged everywhere: no space left") as caught:
        _, module = fit(tmp_path, [callback], logger=loggers)
    assert sum("could not be logged" in str(w.message) for w in caught) == 1
    with (Path(loggers[1].log_dir) / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["mir"]] == ["0", "3", "6"]
    assert len(callback.history) == 3
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    with pytest.raises(OSError, match="no space left"):
        fit(tmp_path, [MIRCallback(probe, on_error="raise")], logger=loggers)


def test_standard_error_is_logged_and_drawn_where_asked_for(tmp_path, probe):
    callback = MIRCallback(probe, every_n_steps=3, interval=True)
    trainer, module = fit(tmp_path, [callback])
    last = [row for row in logged_rows(trainer) if row["mir"]][-1]
    result = evaluate_mir(module.vlm, probe, interval=True)
    assert float(last["mir_se"]) == pytest.approx(result.standard_error, rel=1e-5)
    (band,) = callback.draw(result, 6)[0]["overview"].axes[1].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() - heights.min() >= 2 * 1.96 * result.standard_error
    with pytest.raises(ValueError, match=r'interval needs variant "paper" or "robust", got .official'):
        MIRCallback(probe, variant="official", interval=True)


def test_labels_that_hold_padding_pictures_or_nothing_are_told(tmp_path, probe):
    batch = tiny_batch(seed=1)
    ids = batch["input_ids"]
    for labels, told in (
        (ids, "40 positions of vision"),
        (ids.masked_fill(ids == IMAGE_TOKEN, -100), "2 positions of padding"),
        (ids.new_full(ids.shape, -100), "all -100"),
    ):
        faulty, module = {**batch, "labels": labels}, Pretraining()
        with pytest.warns(UserWarning, match=f"mir: in the probe, the labels .*{told}"):
            fit(tmp_path, [MIRCallback([faulty])], max_steps=1)
        module.train_dataloader = lambda faulty=faulty: DataLoader([faulty], batch_size=None)
        with pytest.warns(UserWarning, match=f"mir: in training, the labels .*{told}") as caught:
            fit(tmp_path, [MIRCallback(probe)], module, max_steps=2)
        assert sum("in training, the labels" in str(w.message) for w in caught) == 1


class WithItsOwnCallback(Pretraining):
    def configure_callbacks(self):
        return [MIRCallback([tiny_batch(seed=5)], every_n_steps=3)]


def test_configure_callbacks(tmp_path):
    trainer, _ = fit(tmp_path, module=WithItsOwnCallback())
    assert [int(row["step"]) for row in logged_rows(trainer) if row["mir"]] == [0, 3, 6]


class HandWritten(torch.nn.Module):
    """A vision-language model of no library: patches are projected and put before the text."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.embed = torch.nn.Linear(5, 8), torch.nn.Embedding(20, 8)
        self.blocks = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0) for _ in range(3))
        self.norm, self.head = torch.nn.LayerNorm(8), torch.nn.Linear(8, 20)

    def hidden_states(self, patches, input_ids):
        hidden = torch.cat([self.project(patches), self.embed(input_ids[:, patches.shape[1] :])], dim=1)
        for block in self.blocks[:-1]:
            hidden = block(hidden)
            yield hidden
        yield self.norm(self.blocks[-1](hidden))


class HandWrittenTraining(Pretraining):
    def __init__(self):
        pl.LightningModule.__init__(self)
        self.net = HandWritten()

    def training_step(self, batch, batch_idx):
        *_, last = self.net.hidden_states(**batch)
        return torch.nn.functional.cross_entropy(
            self.net.head(last[:, 4:-1]).transpose(1, 2), batch["input_ids"][:, 5:]
        )

    def train_dataloader(self):
        return DataLoader([_hand_batch(s) for s in range(8)], batch_size=None)


def _hand_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "patches": torch.randn(3, 4, 5, generator=generator),
        "input_ids": torch.randint(0, 20, (3, 10), generator=generator),
    }


def test_a_model_that_is_not_hugging_faces(tmp_path):
    vision_mask = (torch.arange(10) < 4).expand(3, 10)
    batches = [{**_hand_batch(100 + s), "vision_mask": vision_mask} for s in range(3)]
    callback = MIRCallback(batches, 3, hidden_states=lambda net, batch: net.hidden_states(**batch), model="net")
    _, module = fit(tmp_path, [callback], HandWrittenTraining())
    assert [point["step"] for point in callback.history] == [0, 3, 6]
    with torch.no_grad():
        states = [list(module.net.hidden_states(b["patches"], b["input_ids"])) for b in batches]
    vision, text = ([torch.cat([s[k][m] for s in states]) for k in range(3)] for m in (vision_mask, ~vision_mask))
    expected = modality_integration_rate(vision, text).item()
    assert callback.history[-1]["mir"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r'no Hugging Face config .* give each probe batch a "vision_mask"'):
        fit(
            tmp_path,
            [MIRCallback([_hand_batch(1)], hidden_states=callback.places["hidden_states"])],
            HandWrittenTraining(),
        )


def test_a_failed_evaluation_warns_once_and_training_goes_on_unchanged(tmp_path, probe):
    class NaNFromStep2(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            layer = pl_module.vlm.model.language_model.layers[1]
            if trainer.global_step == 2:
                self.handle = layer.register_forward_hook(
                    lambda m, a, out: out if torch.is_grad_enabled() else out * torch.nan
                )

    _, plain = fit(tmp_path / "a")
    callback = MIRCallback(probe, every_n_steps=2)
    with pytest.warns(UserWarning, match=r"MIR evaluation at step 2 failed.*layer 1 hold NaN") as caught:
        _, module = fit(tmp_path / "b", [NaNFromStep2(), callback])
    assert sum("MIR evaluation" in str(w.message) for w in caught) == 1
    assert [point["step"] for point in callback.history] == [0]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    with pytest.raises(ValueError, match="layer 1 hold NaN or inf"):
        fit(tmp_path, [NaNFromStep2(), MIRCallback(probe, every_n_steps=2, on_error="raise")])


def test_pictures_that_cannot_be_written_warn_and_lose_no_number(tmp_path, probe):
    (tmp_path / "mir_media").write_text("a file where the folder should be")
    callback = MIRCallback(probe, every_n_steps=3)
    with pytest.warns(UserWarning, match="MIR of step 6 could not be logged everywhere: .*mir_media"):
        fit(tmp_path, [callback], logger=False)
    assert len(callback.history) == 3


def test_two_probes_keep_their_names_apart(tmp_path, probe):
    other = Probe([tiny_batch(seed=7)])
    trainer, _ = fit(tmp_path, [MIRCallback(probe, 3), MIRCallback(other, 3, name="docs")])
    last = [row for row in logged_rows(trainer) if row["docs"]][-1]
    assert last["docs_layers/layer_01"]
    assert (Path(trainer.logger.log_dir) / "docs_media" / "layers.png").exists()
    assert trainer.callback_metrics["docs"] != trainer.callback_metrics["mir"]


class TwoModels(Pretraining):
    def __init__(self):
        super().__init__()
        self.teacher = tiny_llava(seed=3)


class NoModel(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(torch.zeros(1, 2)).sum()

    train_dataloader = Pretraining.train_dataloader
    configure_optimizers = Pretraining.configure_optimizers


def test_a_module_with_no_model_or_two(tmp_path, probe):
    with pytest.raises(ValueError, match=r"NoModel holds no Hugging Face model .*layers=\"path.to"):
        fit(tmp_path, [MIRCallback(probe)], NoModel())
    with pytest.raises(ValueError, match=r"TwoModels holds 2 Hugging Face models \(vlm, teacher\)"):
        fit(tmp_path, [MIRCallback(probe)], TwoModels())
    callback = MIRCallback(probe, model="teacher")
    _, module = fit(tmp_path, [callback], TwoModels())
    assert callback.history[0]["mir"] == pytest.approx(evaluate_mir(module.teacher, probe).mir, rel=1e-6)
    with pytest.raises(ValueError, match="model='student' names no submodule of TwoModels"):
        fit(tmp_path, [MIRCallback(probe, model="student")], TwoModels())


def test_a_probe_without_vision_tokens_is_refused_before_the_first_step(tmp_path):
    batch = tiny_batch()
    batch["input_ids"][batch["input_ids"] == IMAGE_TOKEN] = 5
    with pytest.raises(ValueError, match="the probe has 0 vision tokens"):
        fit(tmp_path, [MIRCallback([batch])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"variant": "fast"}, "variant must be one of paper, robust, official, official-fast, got 'fast'"),
        ({"text": "caption"}, "text must be one of after_vision, all"),
        ({"on_error": "ignore"}, "on_error must be one of warn, raise"),
        ({"max_overhead": 0}, "max_overhead must lie above 0 and up to 1, got 0"),
        ({"at_steps": [0, 5]}, "at_steps must be 1 or more .*got 0"),
        ({"growth": 1.0}, "growth must be above 1, got 1.0"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1, got 0"),
        ({"every_n_tokens": -1}, "every_n_tokens must be at least 1, got -1"),
    ],
)
def test_bad_options(probe, options, message):
    with pytest.raises(ValueError, match=message):
        MIRCallback(probe, **options)


def test_a_data_loader_as_probe_leaves_the_run_as_it_is(tmp_path):
    batches = [tiny_batch(seed=100), tiny_batch(seed=101)]
    plain = fit(tmp_path / "plain", [])
    seen = fit(tmp_path / "seen", [MIRCallback(DataLoader(batches, batch_size=None, shuffle=True), 2)])
    assert_same_run(plain, seen)


def test_a_callback_of_one_run_begins_anew_in_the_next(tmp_path, probe):
    callback = MIRCallback(probe, every_n_steps=None, at_start=False)
    fit(tmp_path / "first", [callback], max_steps=4)
    trainer, second = fit(tmp_path / "second", [callback], max_steps=4, module=Pretraining(seed=1))
    assert [point["step"] for point in callback.history] == [4]
    assert callback.history[0]["mir"] == pytest.approx(evaluate_mir(second.vlm, probe).mir)
    assert trainer.callback_metrics["mir"].item() == pytest.approx(callback.history[0]["mir"], rel=1e-6)


@pytest.mark.parametrize("changed", [{"variant": "robust"}, {"text": "all"}])
def test_a_resumed_curve_of_another_reading_is_no_curve(tmp_path, probe, changed):
    trainer, _ = fit(tmp_path, [MIRCallback(probe, 2)], max_steps=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    (key, value), *_ = changed.items()
    with pytest.raises(ValueError, match=f"probe: its {key} {value} is not that of the checkpoint"):
        fit(tmp_path, [MIRCallback(probe, 2, strict_probe=True, **changed)], ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize("quick", ["fast_dev_run", "barebones"])
def test_quick_looks_leave_no_pictures(tmp_path, probe, quick):
    options = {"fast_dev_run": {"fast_dev_run": 2}, "barebones": {"barebones": True}}[quick]
    settings = {"accelerator": "cpu", "default_root_dir": tmp_path, **options}
    if quick == "barebones":
        settings["max_steps"] = 2
    callback = MIRCallback(probe, 1)
    trainer = pl.Trainer(**settings, callbacks=[callback])
    trainer.fit(Pretraining())
    assert len(callback.history) >= 2
    assert not list(tmp_path.rglob("*.png"))


def test_mir_by_source_is_logged(tmp_path):
    sources = ("pages", "captions", "pages")
    probe = Probe([{**tiny_batch(seed=100 + i), "source": [name] * 4} for i, name in enumerate(sources)])
    callback = MIRCallback(probe, every_n_steps=3)
    fit(tmp_path, [callback])
    assert all({"mir_sources/captions", "mir_sources/pages"} <= row.keys() for row in callback.history)
    probe = Probe([{**tiny_batch(seed=i), "source": [name] * 4} for i, name in enumerate(("a/b", "c"))])
    with pytest.raises(ValueError, match="source 'a/b' of the probe must hold no"):
        fit(tmp_path, [MIRCallback(probe)])
