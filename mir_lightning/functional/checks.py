"""Checks of plain arguments, shared by every floor."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise a ``ValueError`` unless ``value`` is one of the values of the ``Literal`` type ``choices``."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(str, get_args(choices)))}, got {value!r}.")


def check_at_least_one(**values: int) -> None:
    """Raise a ``ValueError`` that names the first of ``values`` below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def check_floating(name: str, value: object, shape: str = "") -> None:
    """Raise a ``TypeError`` unless ``value`` is a floating point tensor, of the ``shape`` to name in the error."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating point tensor{shape}, got {given}.")


def check_loaded(place: str | Path, found: Mapping[str, Iterable[Any]], parts: bool = False) -> None:
    """Raise a ``ValueError`` that names weights which a model did not find in its files, or could not place.

    ``found`` is Hugging Face's ``output_loading_info``; with ``parts`` the files may hold more than the model.
    """
    reasons = {"missing_keys": "missing", "mismatched_keys": "of another shape"}
    if not parts:
        reasons["unexpected_keys"] = "unknown to the model"
    for key, reason in reasons.items():
        if names := sorted(each if isinstance(each, str) else _shapes(*each) for each in found[key]):
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(f"{place}: weights are {reason}: {shown}.")


def _shapes(name: str, saved: Iterable[int], own: Iterable[int]) -> str:
    return f"{name} ({[*saved]} in the file, {[*own]} in the model)"
