"""Where samples come from: the base of all sources, and how training and held-out samples are drawn."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from mir_lightning.probing.images import UnreadableImageError


@dataclass(frozen=True)
class Sample:
    """What a model learns from."""

    images: tuple[Image.Image, ...]  # RGB
    turns: tuple[str, ...]  # of a conversation, the human's first, with ``<image>`` where a picture stands
    unreadable: tuple[str, ...] = ()  # what had to be left out to get here, one line each
    name: str = ""  # where it comes from, for errors
    source: str = ""  # which one of a mixture


Collate = Callable[[Sequence[Sample]], Any]


class Source(ABC):
    """Samples to learn from. A kind of data is a subclass, chosen with ``data.source``."""

    @abstractmethod
    def split(self, held_out: int, scale: int | None, seed: int) -> tuple[Any, Any]:
        """Draw ``scale`` samples to train on (None: all others), and the held-out ones, the same at every scale.

        Raises:
            ValueError: if there are fewer.
        """

    def lengths(self) -> list[int] | None:
        """Of the source's samples, to put those of like length into a batch; None where they are not known."""
        return None

    def stream(self, training: Any, collate: Collate, **options: Any) -> Any:
        """A DataLoader with a state of its own for samples that have no index; None where they have."""
        return None


class IndexedSource(Source, Dataset):
    """A source whose samples can be got by their index, ``source[index]``."""

    @abstractmethod
    def __len__(self) -> int: ...

    def split(self, held_out: int, scale: int | None, seed: int) -> "tuple[Samples, Samples]":
        """A seeded draw."""
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        end = held_out + training_size(held_out, scale, len(order), "given")
        return Samples(self, order[held_out:end]), Samples(self, order[:held_out])


def training_size(held_out: int, scale: int | None, total: int, where: str) -> int:
    """How many of so many samples to train on; a ``ValueError`` if there are fewer."""
    wanted = scale or total - held_out
    if wanted < 1 or held_out + wanted > total:
        raise ValueError(f"data_scale={scale} and {held_out} held out need more than the {total} samples {where}.")
    return wanted


@dataclass
class Samples(Dataset):
    """Samples of a source by ``indices``; in place of one with an unreadable picture, which is noted, the next."""

    source: IndexedSource
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        unreadable: list[str] = []
        for step in range(10):
            try:
                sample = self.source[self.indices[(index + step) % len(self)]]
            except UnreadableImageError as error:
                unreadable.append(str(error))
            else:
                return replace(sample, unreadable=tuple(unreadable))
        raise UnreadableImageError(f"ten samples in a row cannot be read: {'; '.join(unreadable)}")
