"""docs/errors.md has every error that the library raises, docs/names.md every name that its callbacks log."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mir_lightning import ImageGainCallback, MIRCallback, Probe, SDSCallback
from mir_lightning.callbacks import CaptionCallback, FewShotCallback
from mir_lightning.probing import ChoiceProbe, FewShotProbe
from tests.items import hard_items, open_items
from tests.models import tiny_batch
from tests.processors import build
from tests.training import Captioning, fit

ROOT = Path(__file__).parents[1]
FLOORS = ("functional", "metrics", "vlm.py", "probing", "callbacks", "moca", "files.py")
MESSAGES = re.findall(r"^\| `(.+?)` ", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
NAMES = re.findall(r"`([^`]+)`", (ROOT / "docs/names.md").read_text())


def _text(node):
    """A message with … for what it fills in; ``None`` where it is made elsewhere."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def _raised():
    for floor in FLOORS:
        place = ROOT / "mir_lightning" / floor
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                    text = _text(node.exc.args[0])
                    if text and text.strip("…: "):
                        yield text


RAISED = list(_raised())
SAID = "\n".join(
    text
    for path in sorted((ROOT / "mir_lightning").rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(text := _text(node), str)
)


def test_there_are_errors():
    assert len(RAISED) >= 100
    assert len(MESSAGES) == len(set(MESSAGES))


@pytest.mark.parametrize("text", RAISED)
def test_an_error_is_on_the_page(text):
    assert any(message in text for message in MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_page_is_raised(message):
    assert message in SAID


def _pattern(name):
    """Of names like ``mir_layers/layer_01`` and ``sds_tasks/<ability>/<task>``."""
    return re.sub(r"<\w+>", "[^/]+", re.sub(r"layer_\d+", r"layer_\\d+", name))


def _unknown(callbacks):
    logged = {name for callback in callbacks for row in callback.history for name in row}
    known = [_pattern(name) for name in NAMES] + ["step", "shared_prefix", "captions"]
    return {name for name in logged if not any(re.fullmatch(pattern, name) for pattern in known)}


def test_what_is_logged_of_pictures_is_on_the_page(tmp_path):
    batches = [{**tiny_batch(seed=seed), "source": [name] * 4} for seed, name in ((100, "photos"), (101, "maps"))]
    callbacks = [MIRCallback(Probe(batches), 3, interval=True), ImageGainCallback(Probe(batches), 3)]
    fit(tmp_path, callbacks)
    assert not _unknown(callbacks)
    assert {name for name in callbacks[0].history[-1] if name.startswith("mir_sources/")}


def test_what_is_logged_of_items_is_on_the_page(tmp_path):
    processor = build("llava")[1]
    few_shot = FewShotProbe(open_items(2), open_items(4, first=9), processor, shots=(0, 2))
    captions = FewShotProbe([replace(item, distractors=()) for item in open_items(2)], (), processor, shots=(0,))
    callbacks = [
        SDSCallback(ChoiceProbe(hard_items(), processor), 3),
        FewShotCallback(few_shot, every_n_steps=3, max_new_tokens=2),
        CaptionCallback(captions, every_n_steps=3, max_new_tokens=2),
    ]
    fit(tmp_path, callbacks, Captioning())
    assert all(callback.history for callback in callbacks)
    assert not _unknown(callbacks)
