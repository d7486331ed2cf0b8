import pytest

from mir_lightning.callbacks.few_shot import FewShotCallback
from mir_lightning.probing.choices.few_shot import FewShotProbe, evaluate_few_shot
from tests.items import open_items
from tests.processors import build
from tests.training import Captioning, assert_same_run, fit, logged_rows


def test_logs_the_scores_of_evaluate_few_shot_and_leaves_the_run_as_it_is(tmp_path):
    probe = FewShotProbe(open_items(3), open_items(4, first=9), build("llava")[1], shots=(0, 2))
    plain = fit(tmp_path / "plain", [], Captioning())
    callback = FewShotCallback(lambda: probe, every_n_steps=4, max_new_tokens=3, on_error="raise")
    trainer, module = fit(tmp_path / "seen", [callback], Captioning())
    rows = [row for row in logged_rows(trainer) if row["few_shot/f1_0"]]
    assert [int(row["step"]) for row in rows] == [0, 4, 6]
    scores = evaluate_few_shot(module.vlm, probe, 3).scores
    for count in (0, 2):
        for name, value in zip(("em", "f1"), scores[count][""], strict=True):
            assert float(rows[-1][f"few_shot/{name}_{count}"]) == pytest.approx(value, abs=1e-6)
            of_task = trainer.callback_metrics[f"few_shot_tasks/{name}_{count}/caption"].item()
            assert of_task == pytest.approx(value, abs=1e-6)
    assert_same_run(plain, (trainer, module))


def test_bad_options():
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        FewShotCallback(None, max_new_tokens=0)
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        FewShotCallback(None, every_n_steps=0)
