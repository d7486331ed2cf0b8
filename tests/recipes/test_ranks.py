"""Two processes and one, with the same global batch: the same curve."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.models import save_tiny_llava
from tests.recipes.runs import MIXTURE, curves_of, small_config, start


@pytest.fixture(scope="module")
def vlm(tmp_path_factory, tiny_processor):
    return save_tiny_llava(tmp_path_factory.mktemp("vlm"), tiny_processor)


def _config(vlm, folder, devices, strategy, *strikes):
    config = small_config(vlm, folder, *strikes)
    config["trainer"] |= {"devices": devices, "max_epochs": 1, "strategy": strategy, "gradient_clip_val": 0.5}
    config["data"] |= {"batch_size": 2 // devices, "global_batch_size": 4, "num_workers": 0}
    config["data"] |= {
        "source": MIXTURE,
        "probe_size": 10,
    }  # some ranks have texts alone where others have pictures
    return config


@pytest.fixture(scope="module")
def alone(tmp_path_factory, vlm):
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run = start(folder, _config(vlm, folder, 1, "auto"))
    assert run.returncode == 0, run.stderr
    return folder


def _start(folder, config):
    """Once more, which goes on, where torch's own code freed memory twice, as FSDP2 over gloo rarely does."""
    run = start(folder, config)
    return start(folder, config) if "double free or corruption" in run.stderr else run


def _curves(folder):
    return {key: float(max(values)) for key, values in curves_of(folder).items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_the_curve_of_one_through_a_change_of_stage(tmp_path, vlm, alone, strategy):
    run = _start(tmp_path, _config(vlm, tmp_path, 2, strategy))
    assert run.returncode == 0, run.stderr
    curves, expected = _curves(tmp_path), _curves(alone)
    assert curves.keys() == expected.keys()
    assert {step for name, step in curves if name == "train/loss"} == set(range(5))
    assert curves == pytest.approx(expected, rel=1e-5, abs=1e-6)  # gains are differences of losses
    models = [AutoModelForImageTextToText.from_pretrained(f / "model").state_dict() for f in (tmp_path, alone)]
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_that_are_preempted_in_the_second_stage_go_on(tmp_path, vlm, alone, strategy):
    config = _config(vlm, tmp_path, 2, strategy, (4, "SIGTERM"))
    preempted = _start(tmp_path, config)
    assert preempted.returncode == 0, preempted.stderr
    assert "stopped by" in preempted.stderr
    finished = _start(tmp_path, config)
    assert finished.returncode == 0, finished.stderr
    assert "going on from" in finished.stderr
    assert _curves(tmp_path) == pytest.approx(_curves(alone), rel=1e-5, abs=1e-6)
