"""How much of a run's time evaluations have taken, and whether one more fits."""

from __future__ import annotations

import time


class Budget:
    """Share of the training time that evaluations take.

    Args:
        max_overhead: largest share allowed, above 0 and up to 1; ``None`` for no limit.

    Raises:
        ValueError: for a ``max_overhead`` outside that range.
    """

    def __init__(self, max_overhead: float | None = None) -> None:
        if max_overhead is not None and not 0 < max_overhead <= 1:
            raise ValueError(f"max_overhead must lie above 0 and up to 1, got {max_overhead}.")
        self.max_overhead = max_overhead
        self.evaluating = 0.0
        self._trained_before = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Training begins, or goes on after a resume."""
        self._trained_before, self._started = self.trained, time.monotonic()

    @property
    def trained(self) -> float:
        """Seconds since training began, evaluations and earlier runs included."""
        now = 0.0 if self._started is None else time.monotonic() - self._started
        return self._trained_before + now

    def restore(self, trained: float, evaluating: float) -> None:
        """Continue the account of an interrupted run."""
        self._trained_before, self.evaluating = trained, evaluating

    def share(self, under_way: float) -> float:
        """Share of the time so far; the evaluation under way has taken so many seconds of it."""
        spent = self.evaluating + under_way
        return spent / max(self.trained, spent, 1e-9)

    def share_after(self, coming: float) -> float:
        """Share of the time once one more evaluation has taken ``coming`` seconds."""
        spent = self.evaluating + coming
        return spent / max(self.trained + coming, spent, 1e-9)

    def allows(self, coming: float) -> bool:
        """Whether an evaluation of ``coming`` seconds keeps within the limit."""
        return self.max_overhead is None or self.share_after(coming) <= self.max_overhead

    def refusal(self, name: str, step: int, coming: float) -> str:
        """What the log says of an evaluation that was left out."""
        return (
            f"{name}: evaluation at step {step} left out: with it, evaluations would have taken "
            f"{self.share_after(coming):.1%} of the training time, above max_overhead={self.max_overhead:.1%}."
        )
