import io
import json
from dataclasses import replace

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image

from mir_lightning.callbacks.captions import CaptionCallback
from mir_lightning.callbacks.figures import caption_figure
from mir_lightning.probing.choices.few_shot import FewShotProbe, evaluate_few_shot
from tests.items import open_items
from tests.processors import build
from tests.training import Captioning, assert_same_run, fit
from tests.wandb_offline import read_offline_run


@pytest.fixture
def items():
    return [replace(item, distractors=()) for item in open_items(2)]


def test_writes_what_the_model_says_and_leaves_the_run_as_it_is(tmp_path, items):
    probe = FewShotProbe(items, (), build("llava")[1], shots=(0,))
    plain = fit(tmp_path / "plain", [], Captioning())
    callback = CaptionCallback(lambda: probe, every_n_steps=4, max_new_tokens=3, on_error="raise")
    wandb = WandbLogger(save_dir=tmp_path, offline=True)
    trainer, module = fit(
        tmp_path / "seen", [callback], Captioning(), logger=[CSVLogger(tmp_path / "seen", "csv"), wandb]
    )
    assert_same_run(plain, (trainer, module))
    assert [point["step"] for point in callback.history] == [0, 4, 6]
    said = evaluate_few_shot(module.vlm, probe, 3).answers[0]
    assert callback.history[-1]["captions"] == said
    (picture,) = (tmp_path / "seen").glob("csv/version_0/captions_media/captions.png")
    assert Image.open(picture).size[0] > 400
    rows, media, _ = read_offline_run(wandb)
    assert len(list((media / "images" / "captions_media").glob("captions_*.png"))) == 3
    logged = [row for row in rows if any(key.startswith("captions_media/table") for key in row)]
    assert [row["trainer/global_step"] for row in logged] == [0, 4, 6]
    table = json.loads(
        max((media / "table" / "captions_media").iterdir(), key=lambda f: f.stat().st_size).read_text()
    )
    assert table["columns"] == ["step", "picture", "caption", "reference"]
    assert table["data"][-2:] == [
        [6, item.id, caption, item.answer] for item, caption in zip(items, said, strict=True)
    ]


def test_items_with_examples_or_without_a_picture_are_refused(tmp_path, items):
    processor = build("llava")[1]
    blind = [replace(item, images=(), prompt="Hello") for item in items]
    for probe in (
        FewShotProbe(items, items, processor, shots=(0, 1)),
        FewShotProbe(blind, (), processor, shots=(0,)),
    ):
        with pytest.raises(ValueError, match="one picture each and no examples"):
            fit(tmp_path, [CaptionCallback(probe)], Captioning())


def test_the_picture_takes_any_text():
    image = Image.new("RGB", (30, 20))
    figure = caption_figure([image, image], ["$x^", ""], ["a dollar $", "long " * 60], 3)
    figure.savefig(io.BytesIO())  # the text would not parse as mathematics
    assert "$x^" in {text.get_text() for axes in figure.axes for text in axes.texts}


def test_more_pictures_than_a_row_holds():
    figure = caption_figure([Image.new("RGB", (30, 20))] * 9, [f"c{i}" for i in range(9)], ["r"] * 9, title="Nine")
    figure.savefig(io.BytesIO())
    assert len([axes for axes in figure.axes if axes.images]) == 9
    assert len({round(axes.get_position().y0, 2) for axes in figure.axes if axes.images}) == 2
    below = figure.axes[[bool(axes.images) for axes in figure.axes].index(True) + 8]
    assert below.texts[0].get_text() == "c0"
    assert figure.get_suptitle() == "Nine"
