"""``mir-lightning sds``: how much a model prefers right answers to wrong ones, by ability and task."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from mir_lightning.cli.models import load_model, load_processor
from mir_lightning.cli.options import ModelOptions, at_least_one, option
from mir_lightning.page import text_table
from mir_lightning.probing.choices.evaluate import ChoiceResult, evaluate_choices
from mir_lightning.probing.choices.items import ChoiceItem
from mir_lightning.probing.choices.m3_bench import load_items
from mir_lightning.probing.choices.probe import ChoiceProbe
from mir_lightning.probing.choices.scores import Score
from mir_lightning.probing.choices.styles import StyleName


@dataclass(kw_only=True)
class SDS(ModelOptions):
    """Soft Discrimination Score (RADAR) of a Hugging Face vision-language model, adapter or recipe checkpoint."""

    model: str = option("folder or hub id of a model or an adapter, or a .ckpt of the recipe", MISSING)
    items: Path = option("M3-Bench folder, or .jsonl file of items of one's own", required=True)
    style: StyleName | None = option("ask as RADAR's released script for such models does")
    score: Score = option(
        'what a token of a candidate counts: "logit" as the released scripts have it, "logprob" to compare models',
        "logit",
    )
    batch_size: int = option("candidates a forward", 32, type=at_least_one)
    max_distractors: int | None = option("draw as many where an item has more", type=at_least_one)
    seed: int = option("of what is drawn", 0)
    template: str | None = option(
        r"text around each prompt, with {prompt} in it and \n for a line break; without one, the style's",
        type=lambda template: template.replace(r"\n", "\n"),
    )
    processor: str | None = option("folder or hub id of the processor, if it is not beside the model")

    def run(self) -> None:
        """Load, ask, write, print."""
        items = load_items(self.items, self.max_distractors, self.seed, self.style)
        probe = ChoiceProbe(items, load_processor(self.model, self.processor), self.template, style=self.style)
        model = load_model(self.model, self)
        progress = None if self.no_progress else "items"
        result = evaluate_choices(model, probe, self.score, self.batch_size, progress=progress)
        columns = ["of", "SDS", "accuracy", "chance", "items"]
        found = [(name or "all", *row) for name, row in result.breakdown.items()]
        self.write(self._record(result, items), [columns, *found])
        print(f"SDS {result.sds:.4f} ({result.score}s, {self.style or 'own'} style; higher is better)")
        rows = ([of, f"{sds:.4f}", f"{right:.4f}", f"{chance:.4f}", f"{n}"] for of, sds, right, chance, n in found)
        print(text_table(columns, rows))

    def _record(self, result: ChoiceResult, items: list[ChoiceItem]) -> dict[str, Any]:
        """As it is written to ``--json``."""
        record: dict[str, Any] = {"model": self.model, "items": str(self.items), "style": self.style}
        numbers = ("sds", "accuracy", "chance", "score", "shared_prefix", "fingerprint", "seconds")
        record |= {key: getattr(result, key) for key in numbers}
        record["breakdown"] = {name: found._asdict() for name, found in result.breakdown.items()}
        scores = zip(items, result.scores, strict=True)
        return {**record, "scores": {item.id: of_item.tolist() for item, of_item in scores}}
