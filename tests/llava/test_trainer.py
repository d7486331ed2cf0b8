"""Signals that come while Python cannot run a handler, full disks, runs that diverge or are killed."""

import hashlib
import os
import resource
import signal
import threading
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors import SafetensorError

from mir_lightning.callbacks.base import ProbingCallback
from mir_lightning.llava.model.saving import ExportingCheckpoint, export_trained
from mir_lightning.llava.trainer import (
    BetweenSteps,
    DivergedError,
    Divergence,
    Preemption,
    RecipeTrainer,
    remove_leftovers,
)
from tests.training import Pretraining, fit, logged_rows


def _busy():
    """Seconds of C code that lets other threads run and looks at no signal."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)


class Struck(Pretraining):
    """Gets signals in the middle of its third step."""

    def __init__(self, capfd, *signals):
        super().__init__()
        self.capfd = capfd
        self.signals = signals
        self.said = None

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            for number in self.signals:
                threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
            self.capfd.readouterr()
            _busy()
            self.said = self.capfd.readouterr().err
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_it_says_at_once_what_it_waits_for_then_saves_and_stops(tmp_path, capfd, number):
    before = signal.getsignal(number), signal.set_wakeup_fd(-1)
    module = Struck(capfd, number)
    preemption = Preemption()
    trainer, _ = fit(tmp_path, [preemption], module)
    assert f"{number.name}: waiting for step 3 (" in module.said
    assert ("Ctrl-C stops at once" in module.said) == (number == signal.SIGINT)
    assert preemption.stopped
    assert trainer.global_step == 3
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert (signal.getsignal(number), signal.set_wakeup_fd(-1)) == before


def test_a_second_interrupt_stops_without_saving(tmp_path, capfd):
    class Twice(Struck):
        def on_before_optimizer_step(self, optimizer):
            if self.said:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit):
        fit(tmp_path, [Preemption()], Twice(capfd, signal.SIGINT))
    assert not (tmp_path / "checkpoints").exists()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored


def test_a_run_that_fails_gives_the_signals_back(tmp_path):
    class Failing(Pretraining):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("in a step")

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in a step"):
            fit(tmp_path, [Preemption()], Failing())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1


class _Evaluation(ProbingCallback):
    """Takes seconds, and gets a signal."""

    label, best = "Slow", "min"

    def __init__(self, capfd):
        super().__init__(SimpleNamespace(fingerprint=""), 2, True, False, name="slow", on_error="raise")
        self.capfd = capfd
        self.said = None

    def make_probe(self, source):
        return source

    def measure(self, loop):
        if loop.step == 2:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            self.capfd.readouterr()
            _busy()
            self.said = self.capfd.readouterr().err
        return SimpleNamespace(seconds=7.0)

    def values(self, result):
        return {}


def test_an_evaluation_in_progress_is_named_with_the_time_it_took_before(tmp_path, capfd):
    evaluation = _Evaluation(capfd)
    fit(tmp_path, [Preemption(), evaluation])
    assert "SIGTERM: waiting for the slow evaluation of step 2 (0 s so far, the last took 7 s)" in evaluation.said


class NoMoreRoom(pl.Callback):
    """From a step on no file may grow beyond a few kilobytes, as on a disk that is full."""

    def __init__(self, step):
        self.step, self.before = step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, self.before[1]))

    def teardown(self, *_, **__):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def _recipe_trainer(folder, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": CSVLogger(folder)}
    settings = {"accelerator": "cpu", "max_steps": 6, "log_every_n_steps": 1, "default_root_dir": folder}
    return RecipeTrainer(callbacks=list(callbacks), **{**settings, **quiet, **options})


def test_a_full_disk_ends_no_run_and_takes_no_good_checkpoint(tmp_path):
    keep = BetweenSteps(tmp_path, "{step}", every_n_train_steps=1, save_top_k=1)
    full = NoMoreRoom(3)
    trainer = _recipe_trainer(tmp_path, full, keep)
    try:
        with pytest.warns(UserWarning, match=r"step=4\.ckpt could not be written, training goes on"):
            trainer.fit(Pretraining())
    finally:
        full.teardown()
    assert trainer.global_step == 6
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=3.ckpt"]
    assert torch.load(tmp_path / "step=3.ckpt", weights_only=True)["global_step"] == 3
    assert not list(tmp_path.glob(".*"))


def test_an_export_that_cannot_be_written_leaves_the_last_one(tmp_path, tiny_processor):
    trainer, module = _recipe_trainer(tmp_path), Pretraining()
    module.processor = tiny_processor
    trainer.strategy.connect(module)
    trainer.strategy._lightning_module = module
    export_trained(trainer, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    module.vlm.lm_head.weight.data.add_(1)
    full = NoMoreRoom(0)
    full.on_train_batch_start(trainer)
    try:
        with pytest.warns(UserWarning, match="model could not be written, training goes on"):
            export_trained(trainer, tmp_path / "model")
        with pytest.raises((OSError, SafetensorError)):
            export_trained(trainer, tmp_path / "model", last=True)
    finally:
        full.teardown()
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert not list(tmp_path.glob(".*"))
    module.vlm.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(DivergedError, match=r"not exported: its weight .*lm_head\.weight is not finite"):
        export_trained(trainer, tmp_path / "model", last=True)


class Diverging(Pretraining):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (torch.nan if batch_idx >= 3 else 1)


def test_a_run_that_has_diverged_ends_and_says_so(tmp_path):
    with pytest.raises(DivergedError, match="by step 8 its loss has not been finite for 5 batches"):
        _recipe_trainer(tmp_path, Divergence(5), max_steps=-1, max_epochs=2).fit(Diverging())
    _recipe_trainer(tmp_path, Divergence(6)).fit(Pretraining())


def test_what_a_killed_run_has_left_half_written_goes(tmp_path):
    trainer = _recipe_trainer(tmp_path)
    for place in (tmp_path / ".model.part", tmp_path / "checkpoints" / ".step=4.part"):
        place.mkdir(parents=True)
        (place / "model.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoints" / ".last.ckpt.part").write_bytes(b"half")
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"whole")
    remove_leftovers(trainer)
    assert [path.name for path in tmp_path.rglob("*") if "part" in path.name or path.suffix == ".ckpt"] == [
        "last.ckpt"
    ]


class Reader(pl.Callback):
    """Logs rows past the Trainer, which saves none of them; reads those on disk when a step begins."""

    def __init__(self, step):
        self.step, self.rows = step, None

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            self.rows = [int(row["step"]) for row in logged_rows(trainer)]
        trainer.logger.log_metrics({"own": 1.0}, step=trainer.global_step)


def test_rows_are_written_with_a_checkpoint_and_later_checkpoints_go_on_resume(tmp_path, tiny_processor):
    def run(steps, resume=None):
        module = Pretraining()
        module.processor = tiny_processor
        best = ExportingCheckpoint(
            tmp_path,
            "{step}",
            monitor="train/loss",
            save_top_k=-1,
            every_n_train_steps=2,
            save_on_train_epoch_end=False,
        )
        reader = Reader(4)
        logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1000)
        options = {"max_steps": steps, "logger": logger, "log_every_n_steps": 1000}
        _recipe_trainer(tmp_path, best, reader, **options).fit(module, ckpt_path=resume)
        return reader.rows

    assert run(6) == [0, 1, 2, 3]
    for kept in ("step=4", "step=6"):
        assert (tmp_path / kept / "model.safetensors").is_file()
    run(3, str(tmp_path / "step=2.ckpt"))
    assert sorted(path.name for path in tmp_path.glob("step=*")) == ["step=2", "step=2.ckpt"]
