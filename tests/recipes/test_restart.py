"""Kill the recipe, and start the same command again: nothing of the run may differ."""

import signal

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.models import save_tiny_llava
from tests.recipes.runs import MIXTURE, curves_of, small_config, start
from tests.shards import write_shards


@pytest.fixture(scope="module")
def vlm(tmp_path_factory, tiny_processor):
    """A tiny LLaVA with dropout, so that a lost random state would show."""
    return save_tiny_llava(tmp_path_factory.mktemp("vlm"), tiny_processor, dropout=0.2)


@pytest.mark.parametrize(
    ("data", "preempted_at"),
    [("mixture", 6), pytest.param("shards", 5, marks=pytest.mark.slow)],  # 5: where an epoch ends
)
def test_a_run_that_is_killed_and_preempted_equals_one_that_is_not(tmp_path, vlm, data, preempted_at):
    folder = str(write_shards(tmp_path / "shards")) if data == "shards" else None
    source = {"source": {"class_path": "Shards", "init_args": {"folder": folder}} if folder else MIXTURE}
    source |= {} if folder else {"pack": True, "max_length": 256}
    whole, struck = tmp_path / "whole", tmp_path / "struck"
    whole.mkdir()
    struck.mkdir()
    run = start(whole, small_config(vlm, whole, data=source))
    assert run.returncode == 0, run.stderr
    config = small_config(
        vlm, struck, (3, "SIGKILL"), (preempted_at, "SIGTERM"), (6, "SIGKILL", True), data=source
    )
    killed = start(struck, config)
    assert killed.returncode == -signal.SIGKILL
    preempted = start(struck, config)
    assert preempted.returncode == 0, preempted.stderr
    assert "going on from" in preempted.stderr
    assert f"stopped by SIGTERM at step {preempted_at}; saved" in preempted.stderr
    assert not (struck / "model").exists()
    assert start(struck, config).returncode == -signal.SIGKILL
    finished = start(struck, config)
    assert finished.returncode == 0, finished.stderr
    assert curves_of(struck) == curves_of(whole)
    assert folder or {"train_share/text", "mir_sources/interleaved"} <= {name for name, _ in curves_of(whole)}
    assert {step for name, step in curves_of(whole) if name == "mir"} == {0, 2, 4, 6, 8, 10}
    states = [AutoModelForImageTextToText.from_pretrained(f / "model").state_dict() for f in (whole, struck)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    _check_what_is_left(struck, vlm)


def _check_what_is_left(folder, vlm):
    """The best checkpoint by MIR, in both formats, alike; the last one; no half-written file."""
    (best,) = (folder / "checkpoints").glob("step=*.ckpt")
    checkpoint = torch.load(best, weights_only=True)
    exported = AutoModelForImageTextToText.from_pretrained(best.with_suffix("")).state_dict()
    assert all(torch.equal(exported[k.removeprefix("vlm.")], v) for k, v in checkpoint["state_dict"].items())
    assert AutoProcessor.from_pretrained(best.with_suffix("")).image_token_id
    callbacks = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    for name in ("RecipeMIR", "CaptionCallback"):
        (history,) = [state["history"] for key, state in callbacks.items() if key.startswith(name)]
        assert [point["step"] for point in history] == [0, 2, 4, 6, 8, 10]  # none where the run was stopped
    assert not list(folder.glob("**/.*.part"))
    assert (folder / "checkpoints" / "finished").exists()
    mirs = [
        float(v) for (name, step), values in curves_of(folder).items() if name == "mir" and step for v in values
    ]
    assert float(best.stem.rsplit("=", 1)[1]) == pytest.approx(min(mirs), abs=1e-3)


def test_a_diverged_model_is_not_exported_and_the_status_says_so(vlm, tmp_path):
    config = small_config(vlm, tmp_path / "run")
    config["model"]["stages"] = [{"train": [{"module": "projector", "lr": 1e25}]}]
    ended = start(tmp_path, config)
    assert ended.returncode == 1
    assert "the model has diverged and is not exported: its weight" in ended.stderr
    assert not (tmp_path / "run" / "model").exists()
