"""What is asked of a model in training, made of its data: a held-out probe, choices, captions, few-shot items."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from mir_lightning import MIRCallback
from mir_lightning.llava.data.module import PretrainingData
from mir_lightning.llava.data.source import Sample
from mir_lightning.llava.demo.emoji import EmojiScenes, scene_few_shot, scene_items
from mir_lightning.llava.demo.questions import shapes_choices, shapes_few_shot
from mir_lightning.probing.choices.few_shot import FewShotProbe
from mir_lightning.probing.choices.items import IMAGE, ChoiceItem
from mir_lightning.probing.choices.m3_bench import load_items
from mir_lightning.probing.choices.probe import ChoiceProbe
from mir_lightning.probing.pairs import PairProbe, read_pairs
from mir_lightning.probing.probe import Probe


@dataclass(frozen=True)
class ProbeFolders:
    """What to measure MIR on, instead of samples held out of the training data.

    Args:
        images: folder of pictures, or a list of them; picture i goes with text i, as in the MIR paper.
        texts: folder of ``.txt``, ``.story`` or ``.jsonl`` files.
    """

    images: Path | None = None
    texts: Path | None = None


class RecipeMIR(MIRCallback):
    """:class:`MIRCallback` on a probe that the data makes; all its options."""

    def __init__(self, probe: ProbeFolders = ProbeFolders(), **options: Any) -> None:
        super().__init__(probe=(), **options)
        self.folders = probe

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the probe."""
        data: PretrainingData = trainer.datamodule  # type: ignore[attr-defined]
        self.probe = partial(mir_probe, data, self.folders)
        super().on_fit_start(trainer, pl_module)


def mir_probe(data: PretrainingData, folders: ProbeFolders) -> Probe:
    """Held-out samples with their labels, or pictures and texts of folders that hold ``probe_size`` of them."""
    if (folders.images is None) != (folders.texts is None):
        raise ValueError("probe: images and texts go together.")
    if folders.images is not None and folders.texts is not None:
        pairs = read_pairs(folders.images, folders.texts, data.probe_size)
        module: Any = data.trainer.lightning_module  # type: ignore[union-attr]
        return PairProbe(module.processor, module.vlm.config, pairs, data.batch_size)
    return held_out_probe(data, data.probe_size)


def held_out_probe(data: PretrainingData, samples: int) -> Probe:
    """The first held-out samples with their labels; of a mixture, those of a source in batches of their own."""
    held_out, size = data.samples[1], data.batch_size
    collate = replace(data.collate, always_pictures=False, pack=False)
    drawn = [held_out[index] for index in range(min(len(held_out), samples))]
    names = dict.fromkeys(sample.source for sample in drawn)
    by_source = [[sample for sample in drawn if sample.source == name] for name in names]
    chunks = (part[start : start + size] for part in by_source for start in range(0, len(part), size))
    batches = [collate(chunk) for chunk in chunks]
    for line in (line for batch in batches for line in batch.pop("unreadable")):
        rank_zero_warn(f"replaced in the probe: {line}")
    return Probe(batches)


def gain_probe(data: PretrainingData) -> Probe:
    """The first of the held-out samples."""
    return held_out_probe(data, data.gain_samples)


def choices(data: PretrainingData) -> ChoiceProbe:
    """Multiple-choice items, asked as the model is trained to answer, or in a style."""
    style = data.choice_style
    items = _questions(data, data.shapes_choices)
    template = data.collate.prompt.question("{prompt}") if style is None else None
    return ChoiceProbe(items, data.collate.processor, template, style=style)


def _questions(data: PretrainingData, per_task: int) -> list[ChoiceItem]:
    """All of a file, or so many of each task on drawn pictures."""
    if data.choice_items is not None:
        return load_items(data.choice_items, seed=data.seed, style=data.choice_style)
    if isinstance(world := data.held_out or data.source, EmojiScenes):
        return scene_items(per_task, things=len(world.things))
    return shapes_choices(per_task, data.seed)


def answers(data: PretrainingData) -> FewShotProbe:
    """Questions to answer in writing, asked as the model is trained to answer."""
    asked = _questions(data, data.answers)
    tasks = dict.fromkeys(item.task for item in asked)
    items = [item for task in tasks for item in [item for item in asked if item.task == task][: data.answers]]
    return FewShotProbe(items, (), data.collate.processor, (0,), template=data.collate.prompt.question("{prompt}"))


def few_shot(data: PretrainingData) -> FewShotProbe:
    """Built-in captions and short answers after 0, 4 and 8 examples, with MM1's prompts."""
    if isinstance(world := data.held_out or data.source, EmojiScenes):
        asked = scene_few_shot(data.shapes_few_shot, things=len(world.things))
    else:
        asked = shapes_few_shot(data.shapes_few_shot, data.seed)
    return FewShotProbe(*asked, data.collate.processor)


def captions(data: PretrainingData) -> FewShotProbe:
    """The first pictures of the held-out samples, asked for their captions as in training."""
    held_out, items = data.samples[1], list[ChoiceItem]()
    for index in range(len(held_out)):
        if len(items) == data.caption_pictures:
            break
        sample: Sample = held_out[index]
        images, turns = sample.images, sample.turns
        if len(images) == 1 and len(turns) > 1:
            asked = turns[0] if data.prompt == "chat" else ""
            prompt = asked if IMAGE in asked else f"{IMAGE}\n{asked}".strip()
            items.append(ChoiceItem(f"held out {index}", prompt, turns[1], (), "caption", "caption", images))
    if not items:
        raise ValueError("caption_pictures: no held-out sample is one picture with an answer; set it to 0.")
    return FewShotProbe(items, (), data.collate.processor, (0,), template=data.collate.prompt.question("{prompt}"))
