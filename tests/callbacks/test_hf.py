import json
from pathlib import Path

import peft
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from mir_lightning import ImageGainCallback, MIRCallback, Probe, SDSCallback, evaluate_mir
from mir_lightning.callbacks import CaptionCallback
from mir_lightning.callbacks.hf import MIRTrainerCallback, ProbingTrainerCallback
from mir_lightning.probing import ChoiceProbe, FewShotProbe
from tests.items import hard_items, open_items
from tests.models import tiny_batch, tiny_llava
from tests.processors import build
from tests.training import caption_batches, fit

STEPS = 6


@pytest.fixture
def probe():
    return Probe([tiny_batch(seed=s) for s in (100, 101)])


def _samples(count=16):
    batches = [tiny_batch(seed=s, batch=1, padded=0) for s in range(count)]
    return [{key: value[0] for key, value in batch.items()} for batch in batches]


def _train(
    folder,
    probe=None,
    resume=None,
    model=None,
    steps=STEPS,
    arguments=(),
    kind=Trainer,
    data=None,
    callbacks=(),
    **options,
):
    torch.manual_seed(0)
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **dict(arguments),
    }
    trainer = kind(
        model or tiny_llava(dropout=0.1),
        TrainingArguments(folder, **settings),
        train_dataset=_samples() if data is None else data,
        eval_dataset=_samples(4),
        callbacks=list(callbacks),
    )
    if probe is not None:
        trainer.add_callback(MIRTrainerCallback(trainer, probe, **{"every_n_steps": 2, **options}))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def _points(trainer, name="mir"):
    return {row["step"]: row[name] for row in trainer.state.log_history if name in row}


def test_the_curve_is_logged_under_the_names_of_the_lightning_callback(tmp_path, probe):
    trainer = _train(tmp_path / "hf", probe)
    assert list(_points(trainer)) == [0, 2, 4, 6]
    assert _points(trainer)[6] == pytest.approx(evaluate_mir(trainer.model, probe).mir, rel=1e-9)
    lightning, _ = fit(tmp_path / "lightning", [MIRCallback(probe, 2)])
    with (Path(lightning.logger.log_dir) / "metrics.csv").open() as file:
        names = {name for name in file.readline().strip().split(",") if name.startswith("mir")}
    row = next(row for row in trainer.state.log_history if "mir" in row)
    assert {name for name in row if name.startswith("mir")} == names
    for picture in ("layers", "heatmap", "tokens"):
        assert (tmp_path / "hf" / "mir_media" / f"{picture}.png").stat().st_size > 5000


def test_training_is_the_same_with_and_without(tmp_path, probe):
    with_it, without = _train(tmp_path / "a", probe), _train(tmp_path / "b")
    for (name, a), b in zip(with_it.model.state_dict().items(), without.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (with_it, without)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS


def test_resume_neither_repeats_nor_loses_a_point(tmp_path, probe):
    saving = {"save_strategy": "steps", "save_steps": 3}
    folder = tmp_path / "whole"
    whole, resumed = (
        _train(folder, probe, resume, arguments=saving) for resume in (None, folder / "checkpoint-3")
    )
    assert list(_points(resumed)) == list(_points(whole)) == [0, 2, 4, 6]
    assert _points(resumed)[2] == _points(whole)[2]
    other = Probe([tiny_batch(seed=5)])
    with pytest.raises(ValueError, match="is not that of the checkpoint"):
        _train(tmp_path / "whole", other, resume=str(tmp_path / "whole" / "checkpoint-3"), strict_probe=True)


def test_schedules(tmp_path, probe):
    options = {"every_n_steps": None, "at_start": False, "at_end": False}
    assert list(_points(_train(tmp_path / "a", probe, at_steps=[1, 5], **options))) == [1, 5]
    assert list(_points(_train(tmp_path / "b", probe, growth=2, **options))) == [1, 2, 4]
    epochs = _train(tmp_path / "c", probe, every_n_epochs=1, steps=16, **options)
    assert list(_points(epochs)) == [8, 16]
    counted = {"include_num_input_tokens_seen": True}
    tokens = _train(tmp_path / "d", probe, every_n_tokens=3 * 2 * 19, arguments=counted, **options)
    assert list(_points(tokens)) == [3, 6]
    with pytest.raises(ValueError, match="every_n_tokens needs include_num_input_tokens_seen"):
        _train(tmp_path / "e", probe, every_n_tokens=10, **options)
    rare = _train(tmp_path / "f", probe, max_overhead=1e-6)
    assert list(_points(rare)) == [0, 6]


def test_a_failed_evaluation_is_reported_and_training_goes_on(tmp_path, probe):
    model = tiny_llava()

    def break_evaluation(module, inputs, output):
        return output * torch.nan if not module.training else output

    model.model.language_model.layers[1].register_forward_hook(break_evaluation)
    with pytest.warns(UserWarning, match="MIR evaluation at step 0 failed, training goes on"):
        trainer = _train(tmp_path, probe, model=model)
    assert trainer.state.global_step == STEPS
    assert not _points(trainer)
    with pytest.raises(ValueError, match="hold NaN"):
        _train(tmp_path, probe, model=model, on_error="raise")


def test_bad_options(tmp_path, probe):
    trainer = _train(tmp_path, steps=1)
    with pytest.raises(TypeError, match=r"trainer must be a .*Trainer, got Probe"):
        MIRTrainerCallback(probe, probe)
    with pytest.raises(TypeError, match="probe is missing"):
        MIRTrainerCallback(trainer)
    with pytest.raises(ValueError, match="max_overhead"):
        MIRTrainerCallback(trainer, probe, max_overhead=2)
    trainer.add_callback(MIRTrainerCallback(trainer, Probe([{"input_ids": torch.ones(1, 4, dtype=torch.long)}])))
    with pytest.raises(ValueError, match="the probe has 0 vision tokens"):
        trainer.train()


def test_checkpoints_carry_the_curve_as_plain_json(tmp_path, probe):
    _train(tmp_path, probe, arguments={"save_strategy": "steps", "save_steps": 2})
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "mir" in row] == [0, 2, 4]


class Truth(TrainerCallback):
    """MIR of the weights after each step."""

    def __init__(self, probe):
        self.probe, self.mir = probe, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.mir[state.global_step] = evaluate_mir(model, self.probe).mir


EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("stops", [False, True])
def test_the_last_point_is_of_the_last_step_where_the_best_model_is_loaded_at_the_end(tmp_path, probe, stops):
    truth = Truth(probe)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    settings = {**EVALUATING, **best, "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    callbacks = [truth, EarlyStoppingCallback(2)] if stops else [truth]
    # Of whole vision-language models transformers 5 loads nothing back: their files have other names.
    model = peft.get_peft_model(tiny_llava(), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    trainer = _train(
        tmp_path, probe, model=model, steps=12, arguments=settings, callbacks=callbacks, every_n_steps=100
    )
    last = max(truth.mir)
    assert (last < 12) == stops
    assert trainer.state.best_global_step < last
    assert _points(trainer)[last] == pytest.approx(truth.mir[last], abs=1e-6)
    assert evaluate_mir(trainer.model, probe).mir != pytest.approx(truth.mir[last], abs=1e-6)


@pytest.mark.parametrize("first", [False, True])
def test_the_best_model_can_be_chosen_by_mir(tmp_path, probe, first):
    stopping = EarlyStoppingCallback(100)
    mir = MIRTrainerCallback(probe, every_n_steps=5)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "mir", "greater_is_better": False}
    settings = {**EVALUATING, **best, "learning_rate": 0.05}
    callbacks = [mir, stopping] if first else [stopping, mir]
    trainer = _train(tmp_path, steps=8, arguments=settings, callbacks=callbacks)
    points = _points(trainer)
    assert sorted(points) == [0, 2, 4, 5, 6, 8]
    assert trainer.state.best_metric == min(points[step] for step in (2, 4, 6, 8))
    assert points[trainer.state.best_global_step] == trainer.state.best_metric
    with pytest.raises(ValueError, match=r"'mir' is best at its minimum.*greater_is_better=False"):
        _train(tmp_path, probe, arguments={**settings, "greater_is_better": True})


def test_evaluations_run_in_the_precision_of_training(tmp_path):
    model = tiny_llava().bfloat16()
    for name, module in model.named_modules():
        if "norm" in name.lower() or "projector" in name:
            module.float()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    probe = Probe([tiny_batch(seed=100)])
    trainer = _train(tmp_path, probe, model=model, steps=2, arguments={"bf16": True}, on_error="raise")
    with trainer.accelerator.autocast():
        assert _points(trainer)[2] == evaluate_mir(trainer.model, probe).mir


def test_epochs_are_counted_where_the_data_have_no_length(tmp_path, probe):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(_samples(6))

    options = {"every_n_steps": None, "every_n_epochs": 2, "at_start": False, "at_end": False}
    assert list(_points(_train(tmp_path, probe, steps=12, data=Stream(), **options))) == [6, 12]


class Merging(Trainer):
    """Logs running figures with the next row, whichever it is, and clears them, as TRL's trainers do."""

    seen = 0

    def training_step(self, *args, **kwargs):
        self.seen += 1
        return super().training_step(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        super().log({**logs, "seen": self.seen}, *args, **kwargs)
        self.seen = 0


def test_rows_of_trainers_that_merge_running_figures_stay_as_they_are(tmp_path, probe):
    with_it, without = (_train(tmp_path, p, kind=Merging, arguments={"logging_steps": 2}) for p in (probe, None))
    seen = [[row["seen"] for row in t.state.log_history if "loss" in row] for t in (with_it, without)]
    assert seen == [[2, 2, 2], [2, 2, 2]]
    assert list(_points(with_it)) == [0, 2, 4, 6]


def test_any_probing_callback_has_the_door(tmp_path):
    model, processor = build("llava")
    sds = SDSCallback(ChoiceProbe(hard_items(), processor), every_n_steps=2)
    samples = [
        {key: value[i] for key, value in batch.items()} for batch in caption_batches(processor)[:2] for i in (0, 1)
    ]
    trainer = _train(tmp_path, model=model, steps=4, data=samples, callbacks=[ProbingTrainerCallback(sds)])
    rows = [row for row in trainer.state.log_history if "sds_abilities/perception" in row]
    assert [row["step"] for row in rows] == [point["step"] for point in sds.history] == [0, 2, 4]
    assert (tmp_path / "sds_media" / "abilities.png").is_file()


def test_what_the_trainer_evaluates_afterwards_is_not_told_an_earlier_mir(tmp_path, probe):
    trainer = _train(tmp_path, probe)
    assert "eval_mir" not in trainer.evaluate()


def test_one_callback_in_two_trainers(tmp_path, probe):
    callback = MIRTrainerCallback(probe, every_n_steps=2)
    for name in ("first", "second"):
        trainer = _train(tmp_path / name, callbacks=[callback])
        assert list(_points(trainer)) == [0, 2, 4, 6]
        assert (tmp_path / name / "mir_media" / "layers.png").is_file()


def test_a_trainer_that_was_never_made_is_in_nobodys_way(tmp_path, probe):
    half = Trainer.__new__(Trainer)
    assert list(_points(_train(tmp_path, callbacks=[MIRTrainerCallback(probe, every_n_steps=3)]))) == [0, 3, 6]
    del half


def test_a_failed_evaluation_is_no_best_one(tmp_path, probe):
    model = tiny_llava()
    model.model.language_model.layers[1].register_forward_hook(
        lambda module, inputs, output: output * torch.nan if not torch.is_grad_enabled() else output
    )
    best = {"load_best_model_at_end": True, "metric_for_best_model": "mir", "greater_is_better": False}
    with pytest.warns(UserWarning, match="failed, training goes on"):
        trainer = _train(tmp_path, probe, model=model, steps=4, arguments={**EVALUATING, **best})
    assert trainer.state.global_step == 4
    assert trainer.state.best_model_checkpoint is None


def test_captions_go_on_after_a_resume(tmp_path):
    model, processor = build("llava")
    samples = [{key: value[0] for key, value in batch.items()} for batch in caption_batches(processor)]
    saving = {"save_strategy": "steps", "save_steps": 2}
    for resume in (None, tmp_path / "checkpoint-2"):
        probe = FewShotProbe(open_items(2), (), processor, (0,))
        captions = CaptionCallback(probe, max_new_tokens=2, every_n_steps=2, on_error="raise")
        callbacks = [ProbingTrainerCallback(captions)]
        _train(tmp_path, resume=resume, model=model, steps=4, data=samples, callbacks=callbacks, arguments=saving)
    assert captions.history[-1]["step"] == 4


def test_alarms_look_at_the_points_of_all_probing_callbacks(tmp_path, probe):
    model = tiny_llava()
    model.model.multi_modal_projector.linear_2.weight.data *= 2000
    callbacks = [ProbingTrainerCallback(ImageGainCallback(probe, 2)), MIRTrainerCallback(probe, every_n_steps=2)]
    with pytest.warns(
        UserWarning, match="mir: step 0: vision tokens are .* times as long as text tokens"
    ) as caught:
        trainer = _train(tmp_path, callbacks=callbacks, model=model)
    assert sum("times as long" in str(w.message) for w in caught) == 1
    assert _points(trainer, "mir_alarms/loud") == {0: 1.0}
    points = callbacks[1].probing.points()
    assert [point["step"] for point in points] == [0, 2, 4, 6]
    assert all({"gain", "gain_error", "mir", "norm_ratio"} <= point.keys() for point in points)
