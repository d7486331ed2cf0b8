import pickle

import numpy as np
import pytest
import torch

from mir_lightning.functional import soft_discrimination_score
from mir_lightning.metrics import SoftDiscriminationScore
from tests.distributed import run_on_ranks

TASKS = {"colour": "perception", "vqa/scene": "perception", "vqa/ocr": "perception", "spatial": "reasoning"}


def _items(seed=0, counts=(7, 3, 5, 4)):
    """``(scores, task)`` of a few items of each task, of 2 to 5 candidates."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(int(torch.randint(2, 6, (), generator=generator)), generator=generator) * 2, task)
        for task, count in zip(TASKS, counts, strict=True)
        for _ in range(count)
    ]


def _fed(items, tasks=TASKS, **options):
    metric = SoftDiscriminationScore(tasks, **options)
    for scores, task in items:
        metric.update([scores], task)
    return metric


def _oracle(items):
    """``(sds, accuracy, chance)`` of every node, in NumPy, task by task."""

    def of(task):
        chosen = [s.double().numpy() for s, t in items if t == task]
        p = [np.exp(s[0]) / np.exp(s).sum() for s in chosen]
        return np.array(
            [np.mean(p), np.mean([s.argmax() == 0 for s in chosen]), np.mean([1 / len(s) for s in chosen])]
        )

    every = [s.double().numpy() for s, _ in items]
    nodes = {
        "": np.mean([[np.exp(s[0]) / np.exp(s).sum(), s.argmax() == 0, 1 / len(s)] for s in every], axis=0),
        "perception/colour": of("colour"),
        "perception/vqa/scene": of("vqa/scene"),
        "perception/vqa/ocr": of("vqa/ocr"),
        "reasoning/spatial": of("spatial"),
        "reasoning": of("spatial"),
    }
    nodes["perception/vqa"] = (nodes["perception/vqa/scene"] + nodes["perception/vqa/ocr"]) / 2
    nodes["perception"] = (nodes["perception/colour"] + nodes["perception/vqa"]) / 2
    return nodes


def _assert_is(metric, items):
    expected, found = _oracle(items), metric.compute_breakdown()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name][:3], values, rtol=1e-12, err_msg=name)
    assert metric.compute().item() == pytest.approx(expected[""][0], rel=1e-12)


def test_tasks_parts_and_abilities_are_means_of_means():
    items = _items()
    metric = _fed(items)
    _assert_is(metric, items)
    found = metric.compute_breakdown()
    assert [found[name].items for name in ("", "perception", "perception/vqa", "reasoning")] == [19, 15, 8, 4]


def test_any_split_into_updates_gives_the_same():
    items = _items()
    metric = SoftDiscriminationScore(TASKS)
    for task in TASKS:
        metric.update([s for s, t in items if t == task], task)
    _assert_is(metric, items)


def test_tasks_without_items_are_left_out():
    items = [(s, t) for s, t in _items() if t == "spatial"]
    assert _fed(items).compute_breakdown().keys() == {"", "reasoning", "reasoning/spatial"}


def test_without_tasks():
    scores = [s for s, _ in _items()]
    metric = SoftDiscriminationScore()
    metric.update(scores)
    assert metric.compute().item() == pytest.approx(soft_discrimination_score(scores).item(), rel=1e-12)
    assert list(metric.compute_breakdown()) == [""]


def test_forward_merge_state_pickle_clone_reset_and_casts():
    items, more = _items(), _items(seed=1)
    metric = SoftDiscriminationScore(TASKS)
    assert metric([items[0][0]], "colour").item() == pytest.approx(soft_discrimination_score([items[0][0]]).item())
    metric.reset()
    metric = _fed(items)
    metric.compute()  # what is cached must not survive the merge
    other = pickle.loads(pickle.dumps(_fed(more))).clone().to(torch.bfloat16).half()
    assert other.sums.dtype == torch.float64
    metric.merge_state(other)
    _assert_is(metric, items + more)
    _assert_is(other, more)
    metric.persistent(True)
    restored = SoftDiscriminationScore(TASKS)
    restored.load_state_dict(metric.state_dict())
    _assert_is(restored, items + more)
    metric.reset()
    with pytest.raises(ValueError, match="no item has been added"):
        metric.compute()


def _uneven(rank, world):
    """The last rank has nothing, and no rank sees every task."""
    items = _items()
    share = {0: items[:8], 1: items[8:]}.get(rank, [])
    metric = _fed(share)
    before = metric.sums.clone()
    found = metric.compute_breakdown()
    assert torch.equal(metric.sums, before), "the local stream must go on"
    return {name: list(score) for name, score in found.items()}


def test_ranks_see_all_items():
    expected = {name: list(score) for name, score in _fed(_items()).compute_breakdown().items()}
    for found in run_on_ranks(_uneven, 3):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-12)


def test_plot_draws_every_task_with_its_chance_and_values_over_time():
    from matplotlib.figure import Figure

    metric = _fed(_items())
    found = metric.compute_breakdown()
    _, axes = metric.plot()
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [score.sds for score in found.values()])
    np.testing.assert_allclose(axes.get_lines()[0].get_xdata(), [score.chance for score in found.values()])
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["all", "perception"]
    axes = Figure().subplots()
    assert metric.plot(ax=axes) == (None, axes)
    _, axes = metric.plot([torch.tensor(0.3), torch.tensor(0.5)])
    assert any(list(line.get_ydata()) == pytest.approx([0.3, 0.5]) for line in axes.get_lines())


def test_bad_arguments():
    metric = SoftDiscriminationScore(TASKS)
    with pytest.raises(ValueError, match=r"task must be one of .*\(colour, vqa/scene, .*got 'shape'"):
        metric.update([torch.zeros(2)], "shape")
    with pytest.raises(ValueError, match=r"task must be one of .*got None"):
        metric.update([torch.zeros(2)])
    with pytest.raises(ValueError, match=r"made without tasks.*got 'colour'"):
        SoftDiscriminationScore().update([torch.zeros(2)], "colour")
    with pytest.raises(ValueError, match="item 0 hold NaN or inf"):
        metric.update([torch.full((2,), torch.nan)], "colour")
    assert metric.sums.sum() == 0
    with pytest.raises(ValueError, match="tasks must map names to abilities, got 'colour': ''"):
        SoftDiscriminationScore({"colour": ""})
    with pytest.raises(ValueError, match="tasks: 'vqa' has parts"):
        SoftDiscriminationScore({"vqa": "perception", "vqa/ocr": "perception"})
    with pytest.raises(ValueError, match="tasks of the metrics differ"):
        metric.merge_state(SoftDiscriminationScore({"colour": "perception"}))
