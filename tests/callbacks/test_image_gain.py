from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from transformers import Trainer, TrainingArguments

from mir_lightning import ImageGainCallback, MIRCallback, Probe, evaluate_image_gain
from mir_lightning.callbacks.figures import gain_figure
from mir_lightning.callbacks.hf import ProbingTrainerCallback
from mir_lightning.probing.network import ProbeWarning
from tests.models import tiny_batch, tiny_llava
from tests.training import assert_same_run, fit, logged_rows


@pytest.fixture
def probe():
    sources = ("web", "books", "books", "web")
    return Probe([{**tiny_batch(seed=s), "source": list(sources)} for s in (100, 101)])


def _names(result):
    return {
        "image_gain": result.gain,
        "image_gain_blank": result.gain_blank,
        "image_gain_se": result.standard_error,
        "image_gain_blank_se": result.standard_error_blank,
        "image_gain_probe/loss": result.loss,
        "image_gain_sources/books": result.sources["books"].gain,
        "image_gain_sources/web": result.sources["web"].gain,
    }


def test_logs_the_numbers_of_evaluate_image_gain_and_leaves_the_run_as_it_is(tmp_path, probe):
    plain = fit(tmp_path / "plain")
    callback = ImageGainCallback(probe, every_n_steps=4, on_error="raise")
    trainer, module = fit(tmp_path / "seen", [MIRCallback(probe, 3), callback])
    assert_same_run(plain, (trainer, module))
    rows = [row for row in logged_rows(trainer) if row["image_gain"]]
    assert [int(row["step"]) for row in rows] == [point["step"] for point in callback.history] == [0, 4, 6]
    expected = _names(evaluate_image_gain(module, probe))
    names = [name for name in rows[0] if name.startswith("image_gain")]
    assert set(names) == {*expected, "image_gain_probe/seconds", "image_gain_probe/overhead"}
    assert not [a for a in names for b in names if b.startswith(f"{a}/")], "no name is the folder of another"
    for name, value in expected.items():
        assert float(rows[-1][name]) == pytest.approx(value, abs=1e-7), name
        seen = trainer.callback_metrics.get(name)
        assert (seen is None) == (name not in ("image_gain", "image_gain_blank")), name
        assert seen is None or seen.item() == pytest.approx(value, abs=1e-7)
    picture = Path(trainer.logger.log_dir) / "image_gain_media" / "curve.png"
    assert Image.open(picture).size == (768, 432)


def test_the_figure_shows_both_gains_with_their_intervals():
    axes = gain_figure([(0, 0.0, 0.1, 0.5, 0.2, 3.0), (10, 0.3, 0.05, 2.0, 0.1, 2.5)]).axes[0]
    gain, blank, zero = axes.get_lines()
    assert (list(gain.get_xdata()), list(gain.get_ydata())) == ([0, 10], [0.0, 0.3])
    assert list(blank.get_ydata()) == [0.5, 2.0]
    assert list(zero.get_ydata()) == [0, 0]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (pytest.approx(-0.196), pytest.approx(0.3 + 1.96 * 0.05))
    assert "Higher is better" in axes.get_title()


def test_checkpoints_are_kept_by_it_and_a_resume_continues_the_curve(tmp_path, probe):
    callback = ImageGainCallback(probe, every_n_steps=2)
    keeper = ModelCheckpoint(
        tmp_path, "{step}", monitor="image_gain", mode="max", every_n_train_steps=2, save_top_k=-1
    )
    fit(tmp_path, [callback, keeper], max_steps=4, enable_checkpointing=True)
    resumed = ImageGainCallback(probe, every_n_steps=2)
    fit(tmp_path, [resumed], ckpt_path=tmp_path / "step=4.ckpt", logger=False)
    assert [point["step"] for point in resumed.history] == [0, 2, 4, 6]
    assert resumed.history[:3] == callback.history


def test_what_can_be_known_is_said_at_the_start_and_once(tmp_path, probe):
    lonely = {**tiny_batch(batch=1), "vision_mask": torch.arange(19)[None] == 2}  # one vision token: unlike others
    with pytest.warns(ProbeWarning, match="1 of the probe's 9 labelled samples") as caught:
        fit(tmp_path, [ImageGainCallback([*probe, lonely], every_n_steps=2, on_error="raise")])
    assert sum(w.category is ProbeWarning for w in caught) == 1
    for batch, message in (
        (tiny_batch(labels=False), "no labelled token"),
        ({**tiny_batch(), "source": [*"abc", "d/e"]}, "source 'd/e' of the probe must hold no \"/\""),
    ):
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, [ImageGainCallback([batch])])
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        ImageGainCallback(probe, every_n_steps=0)


def test_in_the_hugging_face_trainer(tmp_path, probe):
    samples = [{k: v[0] for k, v in tiny_batch(seed=s, batch=1, padded=0).items()} for s in range(8)]
    settings = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    trainer = Trainer(
        tiny_llava(),
        TrainingArguments(tmp_path, metric_for_best_model="image_gain", greater_is_better=True, **settings),
        train_dataset=samples,
        callbacks=[ProbingTrainerCallback(ImageGainCallback(probe, every_n_steps=1, on_error="raise"))],
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "image_gain" in row]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for name, value in _names(evaluate_image_gain(trainer.model, probe)).items():
        assert rows[-1][name] == pytest.approx(value, abs=1e-7), name
    assert (tmp_path / "image_gain_media" / "curve.png").stat().st_size > 5000
