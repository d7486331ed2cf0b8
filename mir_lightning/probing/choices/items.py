"""Multiple-choice items: pictures, a question, the right answer and distractors."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from mir_lightning.files import read_json_lines
from mir_lightning.functional.checks import check_at_least_one
from mir_lightning.probing.images import as_viewed, read_image

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource = Union[str, Path, "Image", Callable[[], "Image"]]

IMAGE = "<image>"


@dataclass(frozen=True)
class ChoiceItem:
    """One multiple-choice question.

    Attributes:
        id: unique among the items of a probe; errors name it.
        prompt: what precedes the answer. ``<image>`` stands where a picture goes; without any, the pictures come
            first, a line each.
        answer: the right one.
        distractors: the wrong ones.
        task: what is asked for; ``"task/part"`` where a task has parts.
        ability: what the task belongs to, for example ``"perception"`` or ``"reasoning"``.
        images: in the order of the prompt: files, PIL images, or zero-argument callables that draw one.
    """

    id: str
    prompt: str
    answer: str
    distractors: tuple[str, ...]
    task: str
    ability: str
    images: tuple[ImageSource, ...] = ()

    @property
    def candidates(self) -> tuple[str, ...]:
        """The right answer, then the distractors."""
        return (self.answer, *self.distractors)


def open_image(source: ImageSource) -> Image:
    """An RGB picture from a file, a PIL image or a callable."""
    if isinstance(source, (str, Path)):
        return read_image(source)
    return as_viewed(source() if callable(source) else source)


def check_items(
    items: Iterable[ChoiceItem], open_ended: bool = False, as_released: bool = False
) -> list[ChoiceItem]:
    """The items as a list, if every one of them can be asked.

    ``open_ended`` ones need no distractor, and ``as_released`` a candidate may be repeated.

    Raises:
        TypeError: for anything but :class:`ChoiceItem`.
        ValueError: without items, or naming every item with a missing picture, pictures and ``<image>`` that do
            not match, no distractor, an empty or repeated candidate, no task or ability, another's id, or a task
            of two abilities.
    """
    checked = list(items)
    for item in checked:
        if not isinstance(item, ChoiceItem):
            raise TypeError(f"items must be ChoiceItem objects, got {type(item).__name__}.")
    if not checked:
        raise ValueError("items is empty: at least one is needed.")
    ids = Counter(item.id for item in checked)
    abilities: dict[str, str] = {}
    problems = []
    for item in checked:
        found = [*_problems(item), *([] if as_released else repetitions(item))]
        if not item.distractors and not open_ended:
            found.append("no distractor")
        if ids[item.id] > 1:
            found.append("its id is not unique")
        if (ability := abilities.setdefault(item.task, item.ability)) != item.ability:
            found.append(f"task {item.task!r} belongs to {ability!r} and {item.ability!r}")
        problems += [f"{item.id}: {problem}" for problem in found]
    if problems:
        raise ValueError(f"items: {len(problems)} problem(s) in {len(checked)} items. {'; '.join(problems)}.")
    return checked


def repetitions(item: ChoiceItem) -> list[str]:
    """What to say of a candidate that an item has twice."""
    counts = Counter(candidate.strip() for candidate in item.candidates)
    repeated = [text for text, count in counts.items() if text and count > 1]
    return [f"duplicate answer {repeated[0]!r}"] if repeated else []


def _problems(item: ChoiceItem) -> Iterator[str]:
    for source in item.images:
        if isinstance(source, (str, Path)) and not Path(source).is_file():
            yield f"image {source} is missing"
    marks = item.prompt.count(IMAGE)
    if marks not in (0, len(item.images)):
        yield f"{marks} {IMAGE} in its prompt and {len(item.images)} images"
    if not item.images and not item.prompt.strip():
        yield "neither question nor image"
    texts = [candidate.strip() for candidate in item.candidates]
    if not texts[0]:
        yield "empty answer"
    if not all(texts[1:]):
        yield "empty distractor"
    for name in ("task", "ability"):
        if not getattr(item, name):
            yield f"no {name}"


def text_of(place: str, value: Any) -> str:
    """A text, or a number as one; a ``ValueError`` for anything else, ``null`` and lists among it."""
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ValueError(f"{place} must be a text or a number, got {value!r:.60}.")
    return str(value)


def texts_of(place: str, values: Any) -> list[str]:
    """A list of texts; a ``ValueError`` for anything else, such as one text, which would fall into letters."""
    if not isinstance(values, list):
        raise ValueError(f"{place} must be a list of texts, got {values!r:.60}.")
    return [text_of(f"{place}[{index}]", value) for index, value in enumerate(values)]


def sample_distractors(texts: Sequence[str], most: int | None, seed: int, item_id: str) -> tuple[str, ...]:
    """``most`` of an item's distractors, in their order; the same ones for the same seed and id. ``None``: all."""
    check_at_least_one(max_distractors=1 if most is None else most)
    if most is None or most >= len(texts):
        return tuple(texts)
    chosen = random.Random(f"{seed}/{item_id}").sample(range(len(texts)), most)
    return tuple(texts[i] for i in sorted(chosen))


def load_choice_items(path: str | Path, max_distractors: int | None = None, seed: int = 0) -> list[ChoiceItem]:
    """Items of one's own from a JSONL file.

    One object a line: ``question`` (``<image>`` where a picture goes), ``answer``, ``distractors`` (a list),
    ``task``, ``ability``, ``image`` (a file name) or ``images`` (a list of them), relative to the JSONL file, or
    neither; perhaps ``id`` (else the line's number).

    Args:
        path: the JSONL file.
        max_distractors: sample as many where an item has more; ``None`` keeps all.
        seed: of the sampling.

    Raises:
        ValueError: for lines that are not JSON objects, or naming all items that cannot be asked (see
            :func:`check_items`).
    """
    path = Path(path)
    rows = list(read_json_lines(path))
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} must be a JSON object, got {type(row).__name__}.")
    return check_items(_item_of(row, path, f"line {number}", max_distractors, seed) for number, row in rows)


def _item_of(
    row: Mapping[str, Any], file: Path, default_id: str, max_distractors: int | None, seed: int
) -> ChoiceItem:
    place = f"{file}, {default_id}"
    item_id = text_of(f"{place}: id", row.get("id", default_id))
    images = row["images"] if "images" in row else [row["image"]] if "image" in row else []
    fields = ("question", "answer", "task", "ability")
    prompt, answer, task, ability = (text_of(f"{place}: {key}", row.get(key, "")) for key in fields)
    wrong = texts_of(f"{place}: distractors", row.get("distractors", []))
    distractors = sample_distractors(wrong, max_distractors, seed, item_id)
    pictures = tuple(file.parent / name for name in texts_of(f"{place}: images", images))
    return ChoiceItem(item_id, prompt, answer, distractors, task, ability, pictures)
