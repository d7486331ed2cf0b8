"""The table of an evidence study: runs, what was varied in them, what they logged, what they scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mir_lightning.files import finite_number, read_csv

BASE = "base"  # the factor of the reference configuration, which belongs to every factor
LEAST_CONFIGURATIONS = 4  # of fewer no order is surprising
_LABELS = ("run", "configuration", "factor", "seed")
# Which way is better, fixed before any score is seen: of the names that one begins with, the longest counts.
_LOWER_IS_BETTER = {
    **{"mir": True, "mir_rank": False, "loss": True, "train/loss": True, "val/loss": True},
    **dict.fromkeys(("image_gain", "sds", "few_shot"), False),
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
        ValueError: naming column and row, and what they hold: columns that are missing, cells that are no numbers,
            runs without a score or described in two ways, a score that is the same in all runs, and too few
            configurations.
    """
    rows = read_csv(path)
    columns = [name for name in rows[0] if name] if rows else []
    if missing := [name for name in (*_LABELS, "step", score) if name not in columns]:
        raise ValueError(f"{path} lacks the column {', '.join(missing)}, or any row; it has {', '.join(columns)}.")
    others = [name for name in columns if name not in (*_LABELS, "step", score, "score")]
    measured = [score, *(name for name in others if not name.startswith("score/"))]
    labels: dict[str, tuple[str, ...]] = {}
    last: dict[tuple[str, str], tuple[float, float]] = {}
    for place, row in enumerate(rows, start=1):
        where = f"{path}, row {place}"
        if row.keys() != set(columns) or None in row.values():
            raise ValueError(f"{where}: it has another number of cells than the first line.")
        if empty := [name for name in (*_LABELS, "step") if not row[name]]:
            raise ValueError(f"{where}: {empty[0]} is empty.")
        here = run, *_ = tuple(str(row[name]) for name in _LABELS)
        if (before := labels.setdefault(run, here)) != here:
            raise ValueError(f"{where}: {run} is {', '.join(here[1:])}, and was {', '.join(before[1:])} before.")
        for name in ("step", "seed", *measured):
            value = finite_number(text := row[name])
            if value is None and text:
                raise ValueError(
                    f"{where}: {name} must be a finite number, or empty if not measured, got {text!r}."
                )
            if value is not None and (step := float(row["step"] or 0)) >= last.get((run, name), (step,))[0]:
                last[run, name] = step, value
    runs = sorted(labels.values(), key=lambda label: (label[1], float(label[3])))
    table = torch.tensor(
        [[last.get((run, name), (0, math.nan))[1] for run, *_ in runs] for name in measured], dtype=torch.float64
    )
    if table[0].isnan().any():
        run = runs[int(table[0].isnan().nonzero()[0])][0]
        raise ValueError(f"{path}: {run} has no {score}; give it one, or leave the run out.")
    if len(values := table[0].unique()) == 1:
        raise ValueError(f"{path}: {score} is {values.item():g} in all runs and ranks none.")
    factors: dict[str, str] = {}
    for run, configuration, factor, _ in runs:
        if (known := factors.setdefault(configuration, factor)) != factor:
            raise ValueError(f"{path}: {configuration}, of {run}, is of two factors, {known} and {factor}.")
    if len(factors) < LEAST_CONFIGURATIONS:
        raise ValueError(f"{path}: {LEAST_CONFIGURATIONS} configurations are needed, got {', '.join(factors)}.")
    readings = dict(zip(measured[1:], table[1:], strict=True))
    return Study([run[1] for run in runs], [run[2] for run in runs], table[0], readings)
