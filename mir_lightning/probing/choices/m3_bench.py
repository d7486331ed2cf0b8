"""M3-Bench (RADAR, arXiv 2602.12892) as it is released: a folder of tasks, each with images and JSON files."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from mir_lightning.files import read_json
from mir_lightning.functional.checks import check_choice
from mir_lightning.probing.choices.items import (
    IMAGE,
    ChoiceItem,
    check_items,
    load_choice_items,
    repetitions,
    sample_distractors,
    text_of,
    texts_of,
)
from mir_lightning.probing.choices.styles import STYLES, Style, StyleName

ABILITIES = {
    "general_visual_question_answering": "perception",
    "Wiki_animal_identification": "perception",
    "Wiki_plant_identification": "perception",
    "Wiki_attraction_identification": "perception",
    "Wiki_celebrity_identification": "perception",
    "multiple_discipline_reasoning": "reasoning",
    "mathematical_reasoning": "reasoning",
    "physical_reasoning": "reasoning",
    "spatial_reasoning": "reasoning",
}
# What MMBench's own taxonomy, from which the general questions are taken, files under reasoning.
_REASONING_PARTS = {
    "function_reasoning",
    "future_prediction",
    "identity_reasoning",
    "nature_relation",
    "physical_property_reasoning",
    "physical_relation",
    "social_relation",
    "structuralized_imagetext_understanding",
}
_MARK = re.compile(r"<image (\d+)>")
_FILE_ENDING = re.compile(r"_\d+_pretrained_mllm_eval$")
_SUFFIXES = (".jpg", ".png", ".jpeg", ".webp")


def load_items(
    path: Path, max_distractors: int | None = None, seed: int = 0, style: StyleName | None = None
) -> list[ChoiceItem]:
    """Items of an M3-Bench folder, or of one's own in a ``.jsonl`` file; options of :func:`load_m3_bench`."""
    if not path.exists():
        raise ValueError(f"items must be an M3-Bench folder or a .jsonl file, got {path}.")
    if path.is_dir():
        return load_m3_bench(path, max_distractors=max_distractors, seed=seed, style=style)
    return load_choice_items(path, max_distractors, seed)


def load_m3_bench(
    folder: str | Path,
    tasks: Sequence[str] | None = None,
    max_distractors: int | None = None,
    seed: int = 0,
    style: StyleName | None = None,
) -> list[ChoiceItem]:
    """Items of M3-Bench.

    A task is a folder with ``images/`` and JSON files ``{q_id: {"question", "answer", "distraction": [...]}}``
    (hidden ones are passed over); where it has several JSON files, each is a part of the task (``"task/part"``).
    Pictures lie in ``images`` or in the subfolder of it that the file is named after. Those of a question are

    - ``<q_id>_image_<k>`` for each ``<image k>`` in its text or options,
    - ``<q_id up to "--">_<i>``, i = 0, 1, ..., where the question has ``img_num``,
    - ``<q_id>`` or ``<q_id up to "--">`` otherwise.

    Where options are pictures they are listed in the prompt, in an order drawn with the seed, and the candidates
    are their letters. Abilities are those of the paper; parts of general visual question answering that MMBench
    files under reasoning belong to reasoning.

    Args:
        folder: holds the task folders.
        tasks: folders to read; all that are there when None.
        max_distractors: sample as many where a question has more; ``None`` keeps all.
        seed: of the sampling, and of the order of options.
        style: draw distractors and the order of options as RADAR's released script does, from one stream of random
            numbers a task (the one for LLaVA keeps one distractor of ``multiple_discipline_reasoning``); keep
            repeated candidates, and leave out questions with more than 12 pictures. To be asked in the same style:
            :class:`~mir_lightning.probing.ChoiceProbe`.

    Returns:
        The items. What cannot be asked is left out, and one warning names each by its id: questions without a
        distractor, with too many pictures, or, without a style, with a candidate twice.

    Raises:
        ValueError: if no task folder or not all of ``tasks`` are there, a JSON file is none or holds something
            else than texts, ``max_distractors`` is given beside a style, or naming all items that cannot be asked
            (see :func:`~mir_lightning.probing.choices.items.check_items`).
    """
    if style is not None:
        check_choice("style", style, StyleName)
        if max_distractors is not None:
            raise ValueError(f"max_distractors={max_distractors}: style={style!r} says how many are drawn.")
    folder = Path(folder)
    names = [name for name in ABILITIES if (folder / name).is_dir()] if tasks is None else list(tasks)
    if missing := [name for name in names if name not in ABILITIES or not (folder / name).is_dir()]:
        raise ValueError(f"tasks: {', '.join(missing)} not found in {folder}; known are {', '.join(ABILITIES)}.")
    if not names:
        raise ValueError(f"{folder} holds no task folder of M3-Bench: looked for {', '.join(ABILITIES)}.")
    kept, left_out = list[ChoiceItem](), list[str]()
    chosen = None if style is None else STYLES[style]
    for item in (i for name in names for i in _task_items(folder / name, _Draw(seed, chosen, max_distractors))):
        reasons = _reasons_to_leave_out(item, style)
        left_out += [f"{item.id}: {reason}" for reason in reasons]
        if not reasons:
            kept.append(item)
    if left_out:
        told = f"M3-Bench: {len(left_out)} questions are left out. {'; '.join(left_out)}."
        if not kept:
            raise ValueError(f"{folder}: no question is left. {told}")
        rank_zero_warn(told)
    return check_items(kept, as_released=style is not None)


def _reasons_to_leave_out(item: ChoiceItem, style: StyleName | None) -> list[str]:
    most = STYLES[style].most_images
    if not item.distractors:
        return ["no distractor, so that any model is right"]
    if most is not None and len(item.images) > most:
        return [f"{len(item.images)} pictures, and the released scripts take {most}"]
    return [] if style is not None else repetitions(item)


@dataclass
class _Draw:
    """What is left to chance: of each question by itself, or as the released scripts do, one stream a task."""

    seed: int
    style: Style | None
    most: int | None  # distractors, without a style

    def __post_init__(self) -> None:
        self.stream = random.Random(self.seed)

    def distractors(self, wrong: list[str], item_id: str, folder: str) -> list[str]:
        """Those to keep."""
        if self.style is None:
            return list(sample_distractors(wrong, self.most, self.seed, item_id))
        one = self.style.one_distractor and folder == "multiple_discipline_reasoning" and len(wrong) > 1
        return self.stream.sample(wrong, 1) if one else wrong

    def options(self, answer: str, wrong: list[str], item_id: str) -> list[str]:
        """The answer and its distractors, in the order of their letters."""
        if self.style is not None:
            return [answer, *wrong] if self.stream.random() > 0.5 else [*wrong, answer]
        order = [answer, *sample_distractors(wrong, self.most, self.seed, item_id)]
        random.Random(f"{self.seed}/{item_id}").shuffle(order)
        return order


def _task_items(folder: Path, draw: _Draw) -> Iterator[ChoiceItem]:
    files = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    if not files:
        raise ValueError(f"{folder} holds no JSON file.")
    for file in files:
        stem = _FILE_ENDING.sub("", file.stem)
        pictures, part = _picture_folders(folder / "images", stem)
        task = f"{folder.name}/{part}" if len(files) > 1 else folder.name
        ability = "reasoning" if part in _REASONING_PARTS else ABILITIES[folder.name]
        for q_id, row in _questions(file).items():
            item_id, place = f"{task}/{q_id}", f"{file}, {q_id}"
            prompt, answer = (text_of(f"{place}: {key}", row.get(key, "")) for key in ("question", "answer"))
            wrong = texts_of(f"{place}: distraction", row.get("distraction", []))
            if type(row.get("img_num", 0)) is not int:
                raise ValueError(f"{place}: img_num must be a whole number, got {row['img_num']!r:.60}.")
            if _MARK.search(" ".join([answer, *wrong, str(row.get("ori_options", ""))])):
                ending = "" if draw.style is None else " "
                prompt, answer, wrong = _lettered(prompt, answer, draw.options(answer, wrong, item_id), ending)
            else:
                wrong = draw.distractors(wrong, item_id, folder.name)
            images = tuple(_picture(pictures, names) for names in _picture_names(q_id, row, prompt))
            yield ChoiceItem(item_id, _MARK.sub(IMAGE, prompt), answer, tuple(wrong), task, ability, images)


def _questions(file: Path) -> Mapping[str, Mapping[str, Any]]:
    found = read_json(file)
    if not isinstance(found, dict) or not all(isinstance(row, dict) for row in found.values()):
        raise ValueError(f"{file} must hold an object of questions by id.")
    return found


def _picture_folders(images: Path, stem: str) -> tuple[list[Path], str]:
    """Where a JSON file's pictures may be, and its part's name: a subfolder that it is named after, if any."""
    inside = [path for path in images.iterdir() if path.is_dir()] if images.is_dir() else []
    named = [path for path in inside if stem == path.name or stem.endswith(f"_{path.name}")]
    if not named:
        return [images], stem
    longest = max(named, key=lambda path: len(path.name))
    return [longest, images], longest.name


def _lettered(question: str, answer: str, options: list[str], ending: str) -> tuple[str, str, list[str]]:
    """Prompt, answer and distractors of options that hold pictures: they are listed under letters."""
    letters = [chr(ord("A") + i) for i in range(len(options))]
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    right = letters[options.index(answer)]
    prompt = f"{question} {listed} Please select the correct option:{ending}"
    return prompt, right, [letter for letter in letters if letter != right]


def _picture_names(q_id: str, row: Mapping[str, Any], prompt: str) -> list[list[str]]:
    """By picture of a question, the names it may have, without suffix."""
    if numbers := _MARK.findall(prompt):
        return [[f"{q_id}_image_{number}"] for number in numbers]
    shared = q_id.split("--")[0]
    if "img_num" in row:
        return [[f"{shared}_{index}"] for index in range(row["img_num"])]
    return [[q_id, shared]]


def _picture(folders: Sequence[Path], names: Sequence[str]) -> Path:
    """The file of one of ``names``; where there is none, the one to report as missing."""
    stems = [folder / name for folder in folders for name in reversed(names)]
    paths = [stem.with_name(f"{stem.name}{suffix}") for stem in stems for suffix in _SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])
