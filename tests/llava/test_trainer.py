"""A signal that comes while Python cannot run a handler, as in a long backward pass."""

import hashlib
import os
import signal
import threading

import pytest

from mir_lightning.callbacks.base import ProbingCallback
from mir_lightning.callbacks.schedule import Schedule
from mir_lightning.llava.trainer import Preemption
from tests.training import Pretraining, fit


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
        super().__init__(Schedule(every_n_steps=2), True, False, "slow", "raise", None, False)
        self.capfd = capfd
        self.said = None

    def _prepare(self, pl_module):
        return "fingerprint", {}

    def _measure(self, trainer, pl_module):
        if trainer.global_step == 2:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            self.capfd.readouterr()
            _busy()
            self.said = self.capfd.readouterr().err
        return type("Result", (), {"seconds": 7.0})()

    def _values(self, result):
        return {}

    def _point(self, result, step):
        return {"step": step, "seconds": result.seconds}

    def _draw(self, trainer, result):
        pass


def test_an_evaluation_in_progress_is_named_with_the_time_it_took_before(tmp_path, capfd):
    evaluation = _Evaluation(capfd)
    fit(tmp_path, [Preemption(), evaluation])
    assert "SIGTERM: waiting for the slow evaluation of step 2 (0 s so far, the last took 7 s)" in evaluation.said
