"""Multiple-choice items from the world of drawn shapes: held out, balanced, and at chance for whoever is blind."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from PIL import Image

from mir_lightning.functional.checks import check_at_least_one
from mir_lightning.llava.demo import shapes
from mir_lightning.llava.demo.shapes import COLOURS, NUMBERS, RELATIONS, SHAPES, SIZES, Scene, Thing, random_thing
from mir_lightning.probing.choices.few_shot import CAPTION_PROMPT, short_answers
from mir_lightning.probing.choices.items import ChoiceItem

Draw = Callable[[str], Image.Image]  # by seed
Group = tuple[str, dict[str, Draw]]  # a question, and for each answer a picture that makes it the right one
MakeGroup = Callable[[random.Random], Group]


def shapes_choices(per_task: int = 300, seed: int = 0) -> list[ChoiceItem]:
    """Multiple-choice items on drawn shapes: perception (colour, shape, size, count) and reasoning.

    Reasoning is spatial relation, comparison of two counts, and arithmetic (the difference of two counts).

    Each question is asked once for each of its answers, with another picture: the candidates are the same and
    every one is right once. A model that does not look at the picture is therefore at chance exactly, in the
    score and in accuracy: 1/6 for colour, 1/5 for shape, 1/2 for size and comparison, 1/4 for count and relation,
    1/3 for arithmetic. No picture shows a scene whose caption is in the training split: single-thing and
    two-thing scenes are of the held-out split, and scenes of two groups never occur in training.

    Args:
        per_task: items of each task, rounded down to whole questions but at least one question; 60 and its
            multiples need no rounding.
        seed: of questions and pictures.
    """
    check_at_least_one(per_task=per_task)
    items = []
    for task, (ability, make_group, answers) in _TASKS.items():
        for number in range(max(1, per_task // answers)):
            question, draws = make_group(random.Random(f"{seed}/{task}/{number}"))
            for answer, draw in draws.items():
                name = f"{task}/{seed}/{number}/{answer}"
                others = tuple(other for other in draws if other != answer)
                items.append(ChoiceItem(name, question, answer, others, task, ability, (partial(draw, name),)))
    return items


def shapes_few_shot(per_task: int = 60, seed: int = 0) -> tuple[list[ChoiceItem], list[ChoiceItem]]:
    """Captions and short answers under MM1's prompts, for :class:`~mir_lightning.probing.FewShotProbe`.

    The first list is to be answered, the second holds examples. Captions to write are of the held-out split, those
    shown of the training split. Questions are those of :func:`shapes_choices`, shown ones with another seed.

    ``per_task`` captions are to be written, and as many questions of each kind to be answered.
    """
    check_at_least_one(per_task=per_task)
    items = [*_captions("held_out", per_task, seed), *short_answers(shapes_choices(per_task, seed))]
    return items, [*_captions("train", 60, seed), *short_answers(shapes_choices(12, seed + 1))]


def _captions(split: shapes.Split, count: int, seed: int) -> Iterator[ChoiceItem]:
    for index in range(count):
        caption = shapes.draw_sample(split, index, seed)[1].lower().rstrip(".")
        name, draw = f"caption/{split}/{seed}/{index}", partial(_picture, split, index, seed)
        yield ChoiceItem(name, CAPTION_PROMPT, caption, (), "caption", "in context", (draw,))


def _picture(split: shapes.Split, index: int, seed: int) -> Image.Image:
    return shapes.draw_sample(split, index, seed)[0]


def _held_out(answers: Iterable[str], make: Callable[[str], Scene]) -> dict[str, Draw]:
    """For each answer what draws the first of the scenes made for it that training never shows."""
    draws: dict[str, Draw] = {}
    for answer in answers:
        while (scene := make(answer)).split != "held_out":
            pass
        draws[answer] = partial(shapes.draw_scene, scene)
    return draws


def _attribute(asked: str, answers: Sequence[str], named: str, names: Sequence[str], question: str) -> MakeGroup:
    """Asks for one attribute of a thing that another attribute names; a second thing differs in that one."""

    def group(rng: random.Random) -> Group:
        name = rng.choice(names)

        def scene(answer: str) -> Scene:
            thing = replace(random_thing(rng), **{asked: answer, named: name})
            while getattr(other := random_thing(rng), named) == name:
                pass
            return Scene(thing, relation=rng.choice(RELATIONS), other=other)

        return question.format(name), _held_out(answers, scene)

    return group


def _count(rng: random.Random) -> Group:
    scenes = _held_out(NUMBERS, lambda number: Scene(random_thing(rng), count=NUMBERS.index(number) + 1))
    return "How many shapes are there?", scenes


def _relation(rng: random.Random) -> Group:
    first, second = rng.sample(SHAPES, 2)

    def scene(relation: str) -> Scene:
        thing, other = replace(random_thing(rng), shape=first), replace(random_thing(rng), shape=second)
        return Scene(thing, relation=relation, other=other)

    return f"Where is the {first}, seen from the {second}?", _held_out(RELATIONS, scene)


def _two_kinds(rng: random.Random) -> tuple[Thing, Thing]:
    """Small things of different colours and forms."""
    forms, colours = rng.sample(SHAPES, 2), rng.sample(list(COLOURS), 2)
    return Thing(colours[0], forms[0], "small"), Thing(colours[1], forms[1], "small")


def _comparison(rng: random.Random) -> Group:
    first, second = _two_kinds(rng)
    fewer, more = sorted(rng.sample(range(1, len(NUMBERS) + 1), 2))
    draws: dict[str, Draw] = {
        first.plural: partial(_draw_groups, first, more, second, fewer),
        second.plural: partial(_draw_groups, first, fewer, second, more),
    }
    return f"Are there more {first.plural} or more {second.plural}?", draws


def _arithmetic(rng: random.Random) -> Group:
    first, second = _two_kinds(rng)
    draws: dict[str, Draw] = {}
    for difference, word in enumerate(NUMBERS[:-1], start=1):
        fewer = rng.randint(1, len(NUMBERS) - difference)
        draws[word] = partial(_draw_groups, first, fewer + difference, second, fewer)
    return f"How many more {first.plural} than {second.plural} are there?", draws


def _draw_groups(first: Thing, first_count: int, second: Thing, second_count: int, seed: str) -> Image.Image:
    """So many of each, strewn over a grid of three by three."""
    rng = random.Random(seed)
    things = [first] * first_count + [second] * second_count
    places = shapes.scattered(rng, (0.2, 0.5, 0.8), len(things), 0.03)
    return shapes.paint(things, places, rng.randint(215, 250), rng)


_COLOURS, _SIZES = list(COLOURS), list(SIZES)
_TASKS: dict[str, tuple[str, MakeGroup, int]] = {  # ability, questions, answers of a question
    "colour": ("perception", _attribute("colour", _COLOURS, "shape", SHAPES, "What colour is the {}?"), 6),
    "shape": ("perception", _attribute("shape", SHAPES, "colour", _COLOURS, "What shape is the {} thing?"), 5),
    "size": ("perception", _attribute("size", _SIZES, "shape", SHAPES, "Is the {} small or large?"), 2),
    "count": ("perception", _count, 4),
    "relation": ("reasoning", _relation, 4),
    "comparison": ("reasoning", _comparison, 2),
    "arithmetic": ("reasoning", _arithmetic, 3),
}
