"""Checks of plain arguments, shared by every floor."""

from __future__ import annotations

from typing import Any, get_args


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise a ``ValueError`` unless ``value`` is one of the strings of the ``Literal`` type ``choices``."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}.")


def check_at_least_one(**values: int) -> None:
    """Raise a ``ValueError`` that names the first of ``values`` below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
