"""Two processes and one, with the same global batch: the same curve."""

import pytest

from tests.models import tiny_llava
from tests.recipes.runs import curves_of, small_config, start


@pytest.fixture(scope="module")
def vlm(tmp_path_factory, tiny_processor):
    folder = tmp_path_factory.mktemp("vlm")
    token = tiny_processor.image_token_id
    tiny_llava(vocab_size=len(tiny_processor.tokenizer), image_token=token).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


def test_ddp_gives_the_curve_of_one_process_through_a_change_of_stage(tmp_path, vlm):
    curves = {}
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        config = small_config(vlm, folder)
        config["trainer"] |= {"devices": devices, "max_epochs": 1, "strategy": "ddp" if devices > 1 else "auto"}
        config["data"] |= {"batch_size": 2 // devices, "global_batch_size": 4, "num_workers": 0}
        run = start(folder, config)
        assert run.returncode == 0, run.stderr
        curves[devices] = {key: float(max(values)) for key, values in curves_of(folder).items()}
    assert curves[2].keys() == curves[1].keys()
    assert {step for name, step in curves[1] if name == "train/loss"} == set(range(5))
    assert curves[2] == pytest.approx(curves[1], rel=1e-5)
