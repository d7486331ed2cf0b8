"""A fixed set of batches to look into a model with, and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Union

import torch
from torch import Tensor

Batch = Mapping[str, Any]
ProbeLike = Union["Probe", Iterable[Batch], Callable[[], Union["Probe", Iterable[Batch]]]]


class Probe:
    """Fixed batches, run through a model again and again so that the numbers are comparable.

    Args:
        batches: iterable of dicts as the model's forward takes them (a ``DataLoader`` too), read once and
            kept on the CPU. Each needs ``input_ids`` ``[B, S]``. Optional keys, taken out before the forward:
            ``vision_mask`` and ``text_mask`` (bool ``[B, S]``). With ``labels`` loss and perplexity are
            measured as well.

    Raises:
        TypeError: if ``batches`` or one of them is of another kind.
        ValueError: if there is no batch, or a batch has no ``input_ids``.

    Example:
        >>> import torch
        >>> probe = Probe([{"input_ids": torch.tensor([[1, 7, 7, 2]])}])
        >>> len(probe), probe.fingerprint[:8]
        (1, '02927d79')
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
            raise TypeError(
                f"batches must be an iterable of dicts of tensors, got {type(batches).__name__}"
                f"{' (put a single batch into a list)' if isinstance(batches, Mapping) else ''}."
            )
        self._batches: list[dict[str, Any]] = []
        for index, batch in enumerate(batches):
            if not isinstance(batch, Mapping):
                raise TypeError(f"batch {index} of the probe must be a dict, got {type(batch).__name__}.")
            if not isinstance(batch.get("input_ids"), Tensor) or batch["input_ids"].ndim != 2:
                raise ValueError(
                    f'batch {index} of the probe needs "input_ids", a tensor [B, S]; its keys are {sorted(batch)}.'
                )
            self._batches.append({key: _to_cpu(value) for key, value in batch.items()})
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

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (dict(batch) for batch in self._batches)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the batches' contents: numbers of equal fingerprints are comparable."""
        digest = hashlib.sha256()
        for batch in self._batches:
            for key in sorted(batch):
                value = batch[key]
                if isinstance(value, Tensor):
                    digest.update(f"{key}:{value.dtype}:{list(value.shape)}:".encode())
                    digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
                else:
                    digest.update(f"{key}:{value!r}:".encode())
        return digest.hexdigest()


def _to_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
