"""A fixed set of batches to look into a model with, and their fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mir_lightning.files import regular_file, save_tensors

Batch = Mapping[str, Any]
ProbeLike = Union["Probe", Iterable[Batch], Callable[[], Union["Probe", Iterable[Batch]]]]

_FILE_FORMAT = "mir-lightning probe 1"


class Probe:
    """Fixed batches, run through a model again and again so that the numbers are comparable.

    Args:
        batches: iterable of dicts as the model's forward takes them (a ``DataLoader`` too), read once and
            kept on the CPU. Each needs ``input_ids`` ``[B, S]``. Optional keys, taken out before the forward:
            ``vision_mask`` and ``text_mask`` (bool ``[B, S]``), and ``source`` (a list of B names: where each
            sample is from). With ``labels`` loss and perplexity are measured as well.

    Raises:
        TypeError: if ``batches`` or one of them is of another kind.
        ValueError: if there is no batch, or a batch has no ``input_ids``.

    Example:
        >>> import torch
        >>> probe = Probe([{"input_ids": torch.tensor([[1, 7, 7, 2]])}])
        >>> len(probe), probe.fingerprint[:8]
        (1, '1f03cf85')
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
            raise TypeError(
                f"batches must be an iterable of dicts of tensors, got {type(batches).__name__}"
                f"{' (put a single batch into a list)' if isinstance(batches, Mapping) else ''}."
            )
        self._digests: dict[int, bytes] = {}
        self._batches = [checked_batch(index, batch) for index, batch in enumerate(batches)]
        if not self._batches:
            raise ValueError("batches is empty: a probe needs at least one batch.")

    @classmethod
    def of(cls, source: ProbeLike) -> Probe:
        """A probe from a probe, an iterable of batches, or a zero-argument callable that makes either."""
        if callable(source) and not isinstance(source, (Probe, Iterable)):
            source = source()
        return source if isinstance(source, Probe) else cls(source)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._batches[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the batches' contents: numbers of equal fingerprints are comparable."""
        whole = hashlib.sha256()
        for index in range(len(self)):
            whole.update(self._digests.get(index) or batch_digest(self[index]))
        return whole.hexdigest()

    def by_source(self) -> dict[str, list[int]]:
        """Which batches are of each source, where there are several and each batch is of one; else nothing."""
        found: dict[str, list[int]] = {}
        for index, batch in enumerate(self):
            if len(names := set(batch.get("source", ()))) != 1:
                return {}
            found.setdefault(names.pop(), []).append(index)
        return dict(sorted(found.items())) if len(found) > 1 else {}

    def part(self, batches: Iterable[int]) -> Probe:
        """A probe of some of the batches, which are not copied."""
        part = Probe.__new__(Probe)
        part._digests, part._batches = {}, [self[index] for index in batches]
        return part

    def pin_memory(self) -> None:
        """Page-lock the batches, so that they move to a GPU while it computes."""
        self._batches = [
            {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
            for batch in self._batches
        ]

    def save(self, path: str | Path, **notes: str) -> None:
        """Write the batches as a safetensors file, with the fingerprint and ``notes`` in its header.

        Raises:
            ValueError: if a batch holds anything but tensors.
        """
        tensors: dict[str, Tensor] = {}
        for index, batch in enumerate(self):
            if others := [key for key, value in batch.items() if not isinstance(value, Tensor)]:
                raise ValueError(
                    f"batch {index} holds {', '.join(others)}, not a tensor: only tensors can be saved."
                )
            tensors |= {
                f"{index}.{key}": value.clone(memory_format=torch.contiguous_format)
                for key, value in batch.items()
            }
        header = {**notes, "format": _FILE_FORMAT, "batches": str(len(self)), "fingerprint": self.fingerprint}
        save_tensors(tensors, path, header)

    @classmethod
    def load(cls, path: str | Path) -> tuple[Probe, dict[str, str]]:
        """A probe that :meth:`save` wrote, and its notes.

        Raises:
            ValueError: if the file is of another kind, or its contents are not those of its fingerprint.
        """
        batches: dict[int, dict[str, Tensor]] = {}
        try:
            with safe_open(regular_file(path), framework="pt") as file:
                notes = file.metadata() or {}
                if notes.get("format") == _FILE_FORMAT:
                    for name in file.keys():  # noqa: SIM118  (no mapping)
                        index, key = name.split(".", 1)
                        batches.setdefault(int(index), {})[key] = file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is no probe: not a whole safetensors file ({error}).") from error
        if not batches:
            raise ValueError(f"{path} is no probe: its header does not say {_FILE_FORMAT!r}.")
        probe = cls([batches[index] for index in sorted(batches)])
        if probe.fingerprint != notes.get("fingerprint"):
            raise ValueError(f"{path}: its contents do not have the fingerprint in its header; it was changed.")
        return probe, notes


def checked_batch(index: int, batch: Any) -> dict[str, Any]:
    """A batch with its tensors on the CPU; an error where it cannot be one."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch {index} of the probe must be a dict, got {type(batch).__name__}.")
    if not isinstance(batch.get("input_ids"), Tensor) or batch["input_ids"].ndim != 2:
        raise ValueError(
            f'batch {index} of the probe needs "input_ids", a tensor [B, S]; its keys are {sorted(batch)}.'
        )
    return apply_to_collection(dict(batch), (Tensor, np.ndarray), _own)


def _own(value: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """A copy on the CPU, which whoever gave it may go on writing into."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value.copy()


def batch_digest(batch: Batch) -> bytes:
    """Of names, types, shapes and contents."""
    digest = hashlib.sha256()
    for key in sorted(batch):
        _add_contents(digest, key, batch[key])
    return digest.digest()


def _add_contents(digest: Any, key: str, value: Any) -> None:
    """Add an entry to a digest by its contents; a ``TypeError`` that names the key where those are not known."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        digest.update(f"array:{key}:{value.dtype}:{list(value.shape)}:".encode() + value.tobytes())
        return
    if isinstance(value, Tensor):
        try:
            contents = value.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        except RuntimeError as error:
            raise TypeError(f"probe: {key} holds a tensor whose contents cannot be read: {error}.") from error
        digest.update(f"{key}:{value.dtype}:{list(value.shape)}:".encode() + contents)
        return
    if isinstance(value, np.generic):
        value = value.item()
    picture = (pillow := sys.modules.get("PIL.Image")) is not None and isinstance(value, pillow.Image)
    kind = "Image" if picture else "dict" if isinstance(value, Mapping) else type(value).__qualname__
    digest.update(f"{key}:{kind}:".encode())
    if isinstance(value, Mapping):
        for name in sorted(value, key=repr):
            _add_contents(digest, f"{key}.{name!r}", value[name])
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            _add_contents(digest, f"{key}[{place}]", inner)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _add_contents(digest, f"{key}.{field.name}", getattr(value, field.name))
    elif picture:
        digest.update(f"{value.mode}:{value.size}:".encode())
        digest.update(value.convert("RGBA").tobytes() if value.mode in ("P", "PA") else value.tobytes())
    elif value is None or isinstance(value, (str, bytes, bool, int, float, complex, torch.dtype, torch.device)):
        digest.update(f"{value!r}:".encode())
    else:
        raise TypeError(
            f"probe: {key} holds a {type(value).__qualname__}, whose contents a fingerprint cannot tell apart. "
            "Use tensors, arrays, pictures, dataclasses, plain values, and lists and dicts of them."
        )
