"""The table of an evidence study: runs, what was varied in them, what they logged, what they scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mir_lightning.files import finite_number, read_csv

BASE = "base"  # the factor of the reference configuration, which belongs to every factor
LEAST_CONFIGURATIONS = 4  # of fewer no order is surprising
_LABELS = ("run", "configuration", "factor", "seed")
# Which way is better, fixed before any score is seen: of the names that a reading's begins with, the longest counts.
_LOWER_IS_BETTER = {
    **{"mir": True, "mir_rank": False, "mir_massive": True, "loss": True, "train/loss": True, "val/loss": True},
    **dict.fromkeys(("image_gain", "sds", "sds_acc", "few_shot"), False),
}


@dataclass(frozen=True)
class Study:
    """Runs in the order of their configurations and seeds, as columns of one length.

    ``readings`` are by the name they were logged under, each run's last; NaN where a run has none.
    """

    configurations: Sequence[str]
    factors: Sequence[str]
    score: Tensor
    readings: Mapping[str, Tensor]

    @property
    def varied(self) -> list[str]:
        """The factors but for the base."""
        return sorted(set(self.factors) - {BASE})


def lower_is_better(reading: str) -> bool | None:
    """Which way a reading is better by convention; None if there is none for its name."""
    known = [name for name in _LOWER_IS_BETTER if reading == name or reading.startswith((f"{name}_", f"{name}/"))]
    return _LOWER_IS_BETTER[max(known, key=len)] if known else None


def read_study(path: Path, score: str = "score") -> Study:
    """A CSV file with a row for each run and point of measurement.

    The columns ``run``, ``configuration``, ``factor``, ``seed``, ``step`` and the score have to be there; each
    other one is a reading, but for ``score`` and ``score/...``. Empty cells were not measured. Of each column a
    run's value is the last one by its step, and of equal steps the later row's.

    Raises:
        ValueError: naming the column, the row and what it holds, if a column is missing, a cell is no number, a
            run is described in two ways or has no score, or the scores or a reading are the same in all runs.
    """
    rows = read_csv(path)
    if not rows:
        raise ValueError(f"{path} holds no run: there is no row below the names of the columns.")
    if missing := [name for name in (*_LABELS, "step", score) if name not in rows[0]]:
        raise ValueError(f"{path} lacks the column {', '.join(missing)}; it has {', '.join(map(str, rows[0]))}.")
    known = (*_LABELS, "step", score)
    names = [name for name in rows[0] if name not in known and name != "score" and not name.startswith("score/")]
    labels: dict[str, tuple[str, ...]] = {}
    last: dict[tuple[str, str], tuple[float, float]] = {}
    for place, row in enumerate(rows, start=1):
        given = tuple((row[name] or "").strip() for name in _LABELS)
        if empty := [name for name, value in zip(_LABELS, given, strict=True) if not value]:
            raise ValueError(f"{path}, row {place}: {empty[0]} is empty.")
        if labels.setdefault(given[0], given) != given:
            first = ", ".join(labels[given[0]][1:])
            raise ValueError(
                f"{path}, row {place}: {given[0]} is {', '.join(given[1:])} here, and before {first}."
            )
        steps = _cell(path, place, row, "step")
        if steps is None:
            raise ValueError(f"{path}, row {place}: step is empty.")
        for name in (score, *names):
            value = _cell(path, place, row, name)
            if value is not None and steps >= last.get((given[0], name), (steps,))[0]:
                last[given[0], name] = steps, value
    runs = sorted(labels.values(), key=lambda of: (of[1], _seed(of[3]), of[0]))
    _check_labels(path, [of[1:3] for of in runs])
    nothing = (0.0, float("nan"))
    columns = {
        name: torch.tensor([last.get((of[0], name), nothing)[1] for of in runs], dtype=torch.float64)
        for name in (score, *names)
    }
    if columns[score].isnan().any():
        run = runs[int(columns[score].isnan().nonzero()[0])][0]
        raise ValueError(f"{path}: {run} has no {score}; give it one, or leave the run out.")
    for name, column in columns.items():
        measured = column[~column.isnan()]
        if len(measured) and (measured == measured[0]).all():
            value = f"{measured[0].item():g} in all {len(measured)} runs"
            raise ValueError(f"{path}: {name} is {value}, so it ranks none of them; leave the column out.")
    return Study([of[1] for of in runs], [of[2] for of in runs], columns.pop(score), columns)


def _cell(path: Path, place: int, row: Mapping[str, str | None], column: str) -> float | None:
    """A number, or None for an empty cell."""
    text = (row[column] or "").strip()
    if text and (number := finite_number(text)) is None:
        raise ValueError(
            f"{path}, row {place}: {column} must be a finite number, or empty if not measured, got {text!r}."
        )
    return number if text else None


def _seed(text: str) -> tuple[float, str]:
    """Seeds that are numbers in their order, before others."""
    number = finite_number(text)
    return (float("inf") if number is None else number, text)


def _check_labels(path: Path, pairs: Sequence[tuple[str, ...]]) -> None:
    """Every configuration has one factor, the base has one configuration."""
    factor: dict[str, str] = {}
    for configuration, own in pairs:
        if factor.setdefault(configuration, own) != own:
            raise ValueError(
                f"{path}: the configuration {configuration} is of two factors, {factor[configuration]}"
                f" and {own}; name the reference's factor {BASE}, which belongs to all."
            )
    if len(bases := [name for name, own in factor.items() if own == BASE]) > 1:
        raise ValueError(f"{path}: {BASE} is the factor of one configuration, got {', '.join(bases)}.")
    if len(factor) < LEAST_CONFIGURATIONS:
        raise ValueError(f"{path}: rank statistics need {LEAST_CONFIGURATIONS} configurations, got {len(factor)}.")
