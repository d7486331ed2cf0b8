import pytest
import torch

from mir_lightning.callbacks.alarms import label_fault, points_of, raised
from tests.faults import alarms_of, run

PLANTED = {  # the alarm, and the step by which it is raised
    "shuffled": ({"no_gain"}, 100),
    "zeroed": ({"no_gain"}, 100),
    "unshifted": ({"no_gain"}, 160),
    "frozen": ({"no_gain"}, 100),
    "standing": ({"loss_stands"}, 60),
    "loud": ({"loud"}, 0),
    "collapsing": ({"collapse", "no_gain"}, 100),
    "leaking": ({"gain_falls", "no_gain", "loss_rises"}, 180),  # all are true; the seed says which is first
}


def _check(found, fault):
    if fault is None:
        assert found == {}
        return
    expected, by = PLANTED[fault]
    assert expected & found.keys(), found
    assert min(found[name] for name in expected & found.keys()) <= by
    others = {"collapse", "no_gain"} if "no_gain" in expected or "collapse" in expected else set()
    assert found.keys() <= expected | others, "an alarm of another kind"


@pytest.mark.parametrize("fault", ["shuffled", "zeroed", "unshifted", "frozen"])
def test_a_planted_fault_raises_its_alarm_in_time(tmp_path, fault):
    with pytest.warns(UserWarning, match=r"(mir|image_gain): step \d+: "):
        callbacks = run(tmp_path, fault)
    _check(alarms_of(callbacks), fault)


def test_a_clean_run_raises_none(tmp_path):
    assert alarms_of(run(tmp_path)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("fault", [None, *PLANTED])
def test_faults_and_clean_runs_of_other_seeds(tmp_path, fault, precision):
    for seed in range(5 if fault is None else 3):
        _check(alarms_of(run(tmp_path, fault, seed, steps=180, precision=precision)), fault)


def test_an_alarm_is_raised_once_and_logged_under_the_callbacks_name(tmp_path):
    with pytest.warns(UserWarning, match="vision tokens are .* times as long") as caught:
        gain, mir = run(tmp_path, "loud", steps=4, every=2)
    assert sum("times as long" in str(w.message) for w in caught) == 1
    assert [("mir_alarms/loud" in row) for row in mir.history] == [True, False, False]
    assert not [key for row in gain.history for key in row if "alarms" in key]


def _points(**readings):
    steps = len(next(iter(readings.values())))
    return [{"step": step, **{k: v[step] for k, v in readings.items()}} for step in range(steps)]


@pytest.mark.parametrize(
    ("readings", "names"),
    [
        ({"loss": [4, 2, 1, 0.95, 0.94, 0.93], "gain": [0.0] * 6, "gain_error": [0.1] * 6}, ["no_gain"]),
        ({"loss": [4, 2, 1, 0.95, 0.94, 0.93], "gain": [0.0] * 5 + [0.3], "gain_error": [0.1] * 6}, []),
        ({"loss": [4, 4, 3, 2.8, 2, 1], "gain": [0.0] * 6, "gain_error": [0.1] * 6}, []),  # still learning words
        ({"loss": [4, 3.9, 3.8, 3.8, 3.8, 3.7], "gain": [0.0] * 6, "gain_error": [0.1] * 6}, []),  # hardly fell
        ({"loss": [4, 2, 1], "gain": [0, 0.5, 0.2], "gain_error": [0.05] * 3}, ["gain_falls"]),
        ({"loss": [4, 2, 1], "gain": [0, 0.5, 0.2], "gain_error": [0.2] * 3}, []),  # within its noise
        ({"loss": [4, 2, 2.5], "gain": [0, 0.5, 0.2], "gain_error": [0.05] * 3}, []),  # the loss rose as well
        ({"rank": [40, 40, 30, 9], "gain": [0.0] * 4, "gain_error": [0.1] * 4}, ["collapse"]),
        ({"rank": [40, 40, 30, 9], "gain": [0, 0, 0.2, 0.5], "gain_error": [0.1] * 4}, []),
        ({"norm_ratio": [1, 12]}, ["loud"]),
        ({"norm_ratio": [12, 1]}, []),
        ({"mir_loss": [3, 0]}, ["loss_stands"]),
        ({"mir_loss": [3, 2, 2, 2, 2]}, ["loss_stands"]),
        ({"mir_loss": [3, 2, 2, 2, 1.9]}, []),
        ({"mir_loss": [3, 2, 2.5, 2.7, 2.6]}, ["loss_rises"]),
        ({"mir_loss": [3, 2, 2.5, 2.7, 2.4]}, []),
    ],
)
def test_what_the_last_point_says(readings, names):
    points = _points(**readings)
    alarms = raised(points)
    assert [alarm.name for alarm in alarms] == names
    for alarm in alarms:
        assert alarm.step == len(points) - 1
        assert alarm.message.startswith(f"step {alarm.step}: ")
        assert alarm.message.endswith("?")


def test_readings_of_several_callbacks_meet_at_their_steps():
    assert points_of([[(0, {"gain": 1.0}), (4, {"gain": 2.0})], [(2, {"mir": 3.0}), (4, {"mir": 5.0})]]) == [
        {"step": 0, "gain": 1.0},
        {"step": 2, "mir": 3.0},
        {"step": 4, "gain": 2.0, "mir": 5.0},
    ]


def test_labels_that_are_right_or_absent_are_no_fault():
    ids, vision = torch.tensor([[7, 3, 8, 0]]), torch.tensor([[False, True, False, False]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    assert label_fault([batch, {**batch, "labels": torch.tensor([[-100, -100, 8, -100]])}], [vision] * 2) is None
