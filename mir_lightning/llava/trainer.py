"""The recipe's Trainer: Lightning's, with a precision that suits the machine."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from mir_lightning.hardware import best_precision, warn_of_slow_bfloat16


class RecipeTrainer(pl.Trainer):
    """Lightning's ``Trainer``, whose precision may be ``"auto"``.

    Args:
        precision: as Lightning has it, or ``"auto"``, which our configs ask for: ``"bf16-mixed"`` where the device
            computes bfloat16 natively, else ``"32-true"``.
        accelerator: as Lightning has it.
        options: of Lightning's Trainer.

    Attributes:
        precision_reason: why this precision.
    """

    def __init__(self, *, precision: str | int = "32-true", accelerator: str = "auto", **options: Any) -> None:
        self.precision_reason = "as asked for"
        if precision == "auto":
            precision, self.precision_reason = best_precision(accelerator)
        super().__init__(precision=precision, accelerator=accelerator, **options)  # type: ignore[arg-type]
        if str(precision).startswith("bf16") and self.strategy.root_device.type == "cpu":
            warn_of_slow_bfloat16(f"trainer.precision={precision}", "trainer.precision=auto or 32-true")
