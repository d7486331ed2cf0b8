"""M3-Bench (RADAR, arXiv 2602.12892) as it is released: a folder of tasks, each with images and JSON files."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mir_lightning.files import read_json
from mir_lightning.probing.choices.items import IMAGE, ChoiceItem, check_items, sample_distractors

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


def load_m3_bench(
    folder: str | Path, tasks: Sequence[str] | None = None, max_distractors: int | None = None, seed: int = 0
) -> list[ChoiceItem]:
    """Items of M3-Bench.

    A task is a folder with ``images/`` and JSON files ``{q_id: {"question", "answer", "distraction": [...]}}``;
    where it has several JSON files, each is a part of the task (``"task/part"``), and a subfolder of ``images``
    that the file is named after holds its pictures. The pictures of a question are

    - ``<q_id>_image_<k>`` for each ``<image k>`` in its text or options,
    - ``<q_id up to "--">_<i>``, i = 0, 1, ..., where the question has ``img_num``,
    - ``<q_id>`` or ``<q_id up to "--">`` otherwise.

    Where options are pictures they are listed in the prompt, in an order drawn with the seed, and the candidates
    are their letters. Abilities are those of the paper; parts of general visual question answering that MMBench
    files under reasoning belong to reasoning.

    Args:
        folder: holds the task folders.
        tasks: folders to read; all that are there when None.
        max_distractors: sample as many where a question has more (the released LLaVA script draws one, unseeded,
            for ``multiple_discipline_reasoning``); ``None`` keeps all.
        seed: of the sampling, and of the order of options.

    Raises:
        ValueError: if no task folder or not all of ``tasks`` are there, a JSON file is none, or naming all items
            that cannot be asked (see :func:`~mir_lightning.probing.choices.items.check_items`).
    """
    folder = Path(folder)
    names = [name for name in ABILITIES if (folder / name).is_dir()] if tasks is None else list(tasks)
    if missing := [name for name in names if name not in ABILITIES or not (folder / name).is_dir()]:
        raise ValueError(f"tasks: {', '.join(missing)} not found in {folder}; known are {', '.join(ABILITIES)}.")
    if not names:
        raise ValueError(f"{folder} holds no task folder of M3-Bench: looked for {', '.join(ABILITIES)}.")
    return check_items(item for name in names for item in _task_items(folder / name, max_distractors, seed))


def _task_items(folder: Path, max_distractors: int | None, seed: int) -> Iterator[ChoiceItem]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder} holds no JSON file.")
    for file in files:
        stem = _FILE_ENDING.sub("", file.stem)
        pictures, part = _picture_folder(folder / "images", stem)
        task = f"{folder.name}/{part}" if len(files) > 1 else folder.name
        ability = "reasoning" if part in _REASONING_PARTS else ABILITIES[folder.name]
        for q_id, row in _questions(file).items():
            item_id = f"{task}/{q_id}"
            distractors = sample_distractors(row.get("distraction", []), max_distractors, seed, item_id)
            prompt, answer, distractors = _with_options(row, distractors, random.Random(f"{seed}/{item_id}"))
            images = tuple(_picture(pictures, names) for names in _picture_names(q_id, row, prompt))
            yield ChoiceItem(item_id, _MARK.sub(IMAGE, prompt), answer, distractors, task, ability, images)


def _questions(file: Path) -> Mapping[str, Mapping[str, Any]]:
    found = read_json(file)
    if not isinstance(found, dict) or not all(isinstance(row, dict) for row in found.values()):
        raise ValueError(f"{file} must hold an object of questions by id.")
    return found


def _picture_folder(images: Path, stem: str) -> tuple[Path, str]:
    """Where a JSON file's pictures are, and the name of its part: a subfolder that it is named after, if any."""
    inside = [path for path in images.iterdir() if path.is_dir()] if images.is_dir() else []
    named = [path for path in inside if stem == path.name or stem.endswith(f"_{path.name}")]
    if not named:
        return images, stem
    longest = max(named, key=lambda path: len(path.name))
    return longest, longest.name


def _with_options(
    row: Mapping[str, Any], distractors: tuple[str, ...], rng: random.Random
) -> tuple[str, str, tuple[str, ...]]:
    """Prompt, answer and distractors; options that hold pictures go into the prompt, under letters."""
    question, answer = str(row.get("question", "")), str(row.get("answer", ""))
    if not _MARK.search(" ".join([answer, *distractors, str(row.get("ori_options", ""))])):
        return question, answer, distractors
    order = [answer, *distractors]
    rng.shuffle(order)
    letters = [chr(ord("A") + i) for i in range(len(order))]
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(letters, order, strict=True))
    right = letters[order.index(answer)]
    return f"{question} {listed} Please select the correct option:", right, tuple(x for x in letters if x != right)


def _picture_names(q_id: str, row: Mapping[str, Any], prompt: str) -> list[list[str]]:
    """By picture of a question, the names it may have, without suffix."""
    if numbers := _MARK.findall(prompt):
        return [[f"{q_id}_image_{number}"] for number in numbers]
    shared = q_id.split("--")[0]
    if "img_num" in row:
        return [[f"{shared}_{index}"] for index in range(int(row["img_num"]))]
    return [[q_id, shared]]


def _picture(folder: Path, names: Sequence[str]) -> Path:
    """The file of one of ``names``; where there is none, the one to report as missing."""
    paths = [folder / f"{name}{suffix}" for name in reversed(names) for suffix in _SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])
