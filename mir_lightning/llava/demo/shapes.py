"""An endless world of drawn shapes with captions: what a small model can learn to see in minutes."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from mir_lightning.functional.checks import check_choice
from mir_lightning.llava.data.source import Sample, Source
from mir_lightning.probing.choices.items import IMAGE

Split = Literal["train", "held_out"]
Kind = Literal["captions", "interleaved", "text"]

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

    @property
    def plural(self) -> str:
        """Several of its colour and form."""
        return f"{self.colour} {self.shape}{'es' if self.shape == 'cross' else 's'}"


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
        things = self.thing if self.count == 1 else f"{self.thing.size} {self.thing.plural}"
        return f"{NUMBERS[self.count - 1].capitalize()} {things}."

    @property
    def split(self) -> Split:
        """Which split the caption belongs to; decided by its text alone."""
        digest = hashlib.sha256(self.caption.encode()).digest()
        return "held_out" if digest[0] % _HELD_OUT_SHARE == 0 else "train"


@dataclass
class ShapesDataset(Dataset):
    """``length`` drawn samples of a split; the same index is always the same sample."""

    split: Split
    length: int
    seed: int = 0
    kind: Kind = "captions"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        if self.kind == "captions":
            image, caption = draw_sample(self.split, index, self.seed)
            return Sample((image,), (f"Picture: {IMAGE}", caption))
        rng = random.Random(f"{self.seed}/{self.kind}/{index}")
        seeds = [f"{self.seed}/{part}" for part in range(rng.randint(2, 4))]
        if self.kind == "text":
            scenes = [_scene_of(self.split, index, seed)[0] for seed in seeds]
            return Sample((), (" ".join(scene.caption for scene in scenes),))
        drawn = [draw_sample(self.split, index, seed) for seed in seeds]
        return Sample(
            tuple(image for image, _ in drawn), ("\n".join(f"{IMAGE}\n{caption}" for _, caption in drawn),)
        )


class Shapes(Source):
    """Drawn shapes and their captions, 960 an epoch by default; some captions are of held-out samples only.

    Args:
        kind: ``"captions"``: a picture and its caption; ``"interleaved"``: documents of two to four pictures, each
            before its caption; ``"text"``: as many captions, and no picture.
    """

    def __init__(self, kind: Kind = "captions") -> None:
        check_choice("kind", kind, Kind)
        self.kind = kind

    def split(self, held_out: int, scale: int | None, seed: int) -> tuple[ShapesDataset, ShapesDataset]:
        """As many as are wanted: there is no end of them."""
        training = ShapesDataset("train", scale or 960, seed, self.kind)
        return training, ShapesDataset("held_out", held_out, seed, self.kind)


def draw_sample(split: Split, index: int, seed: int | str = 0) -> tuple[Image.Image, str]:
    """Picture (RGB, 224 x 224) and caption number ``index`` of a split; always the same ones."""
    scene, rng = _scene_of(split, index, seed)
    return draw_scene(scene, rng), scene.caption


def _scene_of(split: Split, index: int, seed: int | str) -> tuple[Scene, random.Random]:
    rng = random.Random(f"{seed}/{split}/{index}")
    while (scene := _random_scene(rng)).split != split:
        pass
    return scene, rng


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


def draw_scene(scene: Scene, seed: str | random.Random) -> Image.Image:
    """A picture of ``scene``; always the same one for the same seed."""
    rng = random.Random(seed) if isinstance(seed, str) else seed
    shade = rng.randint(215, 250)
    if scene.other is None:
        places = scattered(rng, (0.27, 0.73), scene.count, 0.05)
        return paint([scene.thing] * scene.count, places, shade, rng)
    along, across = (rng.uniform(0.22, 0.28), rng.uniform(0.72, 0.78)), rng.uniform(0.35, 0.65)
    first, second = along if scene.relation in ("to the left of", "above") else along[::-1]
    places = [(first, across), (second, across + rng.uniform(-0.08, 0.08))]
    upright = scene.relation in ("above", "below")
    return paint([scene.thing, scene.other], [(y, x) for x, y in places] if upright else places, shade, rng)


def scattered(rng: random.Random, grid: Sequence[float], count: int, by: float) -> list[tuple[float, float]]:
    """Different cells of a square grid, each moved a little; centres in [0, 1], y grows downwards."""
    cells = rng.sample([(x, y) for x in grid for y in grid], count)
    return [(x + rng.uniform(-by, by), y + rng.uniform(-by, by)) for x, y in cells]


def paint(
    things: Sequence[Thing], places: Sequence[tuple[float, float]], shade: int, rng: random.Random
) -> Image.Image:
    """224 x 224 pixels, each thing at its place (centre, in [0, 1]); drawn twice as large, for smooth edges."""
    side = 448
    image = Image.new("RGB", (side, side), (shade, shade, shade))
    pen = ImageDraw.Draw(image)
    for thing, (x, y) in zip(things, places, strict=True):
        radius = SIZES[thing.size] * rng.uniform(0.9, 1.1)
        _draw_thing(pen, thing, x * side, y * side, radius * side)
    return image.resize((side // 2, side // 2), Image.Resampling.BOX)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float) -> None:
    fill = COLOURS[thing.colour]
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    for width, height in {"square": [(0.85, 0.85)], "cross": [(1, 0.3), (0.3, 1)]}.get(thing.shape, []):
        pen.rectangle((x - width * r, y - height * r, x + width * r, y + height * r), fill=fill)
    for rotation in {"triangle": [0], "star": [0, 180]}.get(thing.shape, []):  # a star is two triangles
        pen.regular_polygon((x, y, r), 3, rotation=rotation, fill=fill)
