"""An endless world of drawn shapes with captions: what a small model can learn to see in minutes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

Split = Literal["train", "held_out"]

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 200, 30),
    "purple": (140, 70, 180),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = {"small": 0.09, "large": 0.17}  # radius as a share of the picture's side
NUMBERS = ("one", "two", "three", "four")
RELATIONS = ("to the left of", "to the right of", "above", "below")
_HELD_OUT_SHARE = 8  # one caption in eight never appears in training


@dataclass(frozen=True)
class Thing:
    """A kind of shape: colour, form and size."""

    colour: str
    shape: str
    size: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: ``count`` equal things, or two things in a relation."""

    thing: Thing
    count: int = 1
    relation: str | None = None
    other: Thing | None = None

    @property
    def caption(self) -> str:
        """One sentence that names colour, size, number and relation."""
        if self.other is not None:
            return f"A {self.thing} {self.relation} a {self.other}."
        plural = "es" if self.thing.shape == "cross" else "s"
        return f"{NUMBERS[self.count - 1].capitalize()} {self.thing}{plural if self.count > 1 else ''}."

    @property
    def split(self) -> Split:
        """Which split the caption belongs to; decided by its text alone."""
        digest = hashlib.sha256(self.caption.encode()).digest()
        return "held_out" if digest[0] % _HELD_OUT_SHARE == 0 else "train"


def draw_sample(split: Split, index: int, seed: int = 0, image_size: int = 224) -> tuple[Image.Image, str]:
    """Picture (RGB, ``image_size`` square) and caption number ``index`` of a split; always the same ones."""
    rng = random.Random(f"{seed}/{split}/{index}")
    while (scene := _random_scene(rng)).split != split:
        pass
    return _draw(scene, rng, image_size), scene.caption


def draw_scene(scene: Scene, seed: str, image_size: int = 224) -> Image.Image:
    """A picture of ``scene``; always the same one for the same seed."""
    return _draw(scene, random.Random(seed), image_size)


def random_thing(rng: random.Random) -> Thing:
    """Any colour, form and size."""
    return Thing(rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(SIZES)))


def _random_scene(rng: random.Random) -> Scene:
    thing = random_thing(rng)
    if rng.random() < 0.5:
        return Scene(thing, count=rng.randint(1, len(NUMBERS)))
    while (other := random_thing(rng)) == thing:
        pass
    return Scene(thing, relation=rng.choice(RELATIONS), other=other)


def _draw(scene: Scene, rng: random.Random, image_size: int) -> Image.Image:
    shade = rng.randint(215, 250)
    return paint(_things(scene), _places(scene, rng), shade, rng, image_size)


def paint(
    things: Sequence[Thing], places: Sequence[tuple[float, float]], shade: int, rng: random.Random, image_size: int
) -> Image.Image:
    """Draw each thing at its place (centre, in [0, 1]); at twice the size, scaled down for smooth edges."""
    side = 2 * image_size
    image = Image.new("RGB", (side, side), (shade, shade, shade))
    pen = ImageDraw.Draw(image)
    for thing, (x, y) in zip(things, places, strict=True):
        radius = SIZES[thing.size] * rng.uniform(0.9, 1.1)
        _draw_thing(pen, thing, x * side, y * side, radius * side)
    return image.resize((image_size, image_size), Image.Resampling.BOX)


def _things(scene: Scene) -> list[Thing]:
    return [scene.thing, scene.other] if scene.other is not None else [scene.thing] * scene.count


def _places(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    """Centres in [0, 1]; y grows downwards. Things never overlap."""
    if scene.relation is None:
        cells = rng.sample([(x, y) for x in (0.27, 0.73) for y in (0.27, 0.73)], scene.count)
        return [(x + rng.uniform(-0.05, 0.05), y + rng.uniform(-0.05, 0.05)) for x, y in cells]
    along, across = (rng.uniform(0.22, 0.28), rng.uniform(0.72, 0.78)), rng.uniform(0.35, 0.65)
    first, second = along if scene.relation in ("to the left of", "above") else along[::-1]
    if scene.relation in ("above", "below"):
        return [(across, first), (across + rng.uniform(-0.08, 0.08), second)]
    return [(first, across), (second, across + rng.uniform(-0.08, 0.08))]


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float) -> None:
    fill = COLOURS[thing.colour]
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=fill)
    elif thing.shape == "triangle":
        pen.regular_polygon((x, y, r), 3, fill=fill)
    elif thing.shape == "cross":
        pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=fill)
        pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=fill)
    else:
        _draw_star(pen, x, y, r, fill)


def _draw_star(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: tuple[int, int, int]) -> None:
    """Two triangles, one upside down."""
    pen.regular_polygon((x, y, r), 3, fill=fill)
    pen.regular_polygon((x, y, r), 3, rotation=180, fill=fill)
