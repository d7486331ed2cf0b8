"""Draws docs/images/evidence_{learned,controls,starts}.png of docs/evidence/{study,controls}.csv.

python docs/figures/evidence.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from mir_lightning.callbacks.figures import curve_colour
from mir_lightning.files import read_csv

DOCS = Path(__file__).parents[1]
CHANCE = {"category": 1 / 4, "comparison": 1 / 2, "count": 1 / 4, "identity": 1 / 12, "place": 1 / 4}
READINGS = {
    "score": "score after fine-tuning (higher is better)",
    "mir": "MIR (lower: closer clouds)",
    "mir_robust": "MIR, robust rule (lower: closer clouds)",
    "mir_norm/mean": "norm of vision over text",
    "image_gain": "image gain, nats a token (higher is better)",
    "image_gain_blank": "gain over a blank picture (higher is better)",
    "mir_probe/loss": "held-out loss, nats a token (lower is better)",
    "sds": "SDS (higher is better)",
}
ARMS = ("base", "shuffled", "constant", "zeroed", "faint", "loud", "mir_loss")
STARTS = {"base": "random", "start_zero": "zeros", "start_small": "random / 100", "start_matched": "matched"}


def values(table: str, name: str, last: bool = True) -> dict[str, list[list[float]]]:
    """By configuration: of each run, in the order of seeds, the last value or all."""
    runs: dict[tuple[str, int], list[float]] = {}
    for row in read_csv(DOCS / "evidence" / f"{table}.csv"):
        if row.get(name):
            runs.setdefault((str(row["configuration"]), int(str(row["seed"]))), []).append(float(str(row[name])))
    found: dict[str, list[list[float]]] = {}
    for (configuration, _), curve in sorted(runs.items()):
        found.setdefault(configuration, []).append(curve[-1:] if last else curve)
    return found


def strip(axes: Axes, place: float, runs: list[list[float]], colour: str, alpha: float = 1.0) -> None:
    """A dot a run, a little beside each other."""
    for seed, run in enumerate(runs):
        axes.plot(place + (seed - 1) * 0.12, run[-1], "o", color=colour, markersize=5, alpha=alpha)


def learned() -> None:
    """Scores by task against chance."""
    figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    for place, (task, chance) in enumerate([*CHANCE.items(), ("all", sum(CHANCE.values()) / 5)]):
        found = values("study", "score" if task == "all" else f"score/{task}")
        for runs in found.values():
            strip(axes, place - 0.15, runs, "grey", alpha=0.5)
        strip(axes, place + 0.25, found["base"], curve_colour(0))
        axes.hlines(chance, place - 0.42, place + 0.42, colors=curve_colour(3), linestyles="dashed")
    axes.set_xticks(range(6), [*CHANCE, "all"])
    axes.set(ylim=(0, 1.02), ylabel="exact match, held out", title="grey: every run, blue: base, dashed: chance")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "images" / "evidence_learned.png", dpi=100)


def controls() -> None:
    """Readings of the control arms beside those of the base."""
    figure, panels = plt.subplots(2, 4, figsize=(12.5, 5.6), layout="constrained")
    for axes, (name, title) in zip(panels.flat, READINGS.items(), strict=True):
        found = values("study", name) | values("controls", name)
        base = [run[-1] for run in found["base"]]
        axes.axhspan(min(base), max(base), color=curve_colour(0), alpha=0.15, linewidth=0)
        for place, arm in enumerate(ARMS):
            strip(axes, place, found.get(arm, []), curve_colour(0 if arm == "base" else 3))
        axes.set_xticks(range(len(ARMS)), ARMS, rotation=40, ha="right")
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "images" / "evidence_controls.png", dpi=100)


def starts() -> None:
    """Held-out loss and MIR by what the projector starts from."""
    figure, panels = plt.subplots(1, 4, figsize=(12.5, 3.0), layout="constrained")
    shown = (("mir_probe/loss", 0), ("mir_probe/loss", 1), ("mir", 1), ("score", 0))
    titles = ("held-out loss at step 24", "held-out loss at step 48", "MIR at step 48", "score after fine-tuning")
    for axes, (name, point), title in zip(panels, shown, titles, strict=True):
        found = values("study", name, last=False)
        for place, start in enumerate(STARTS):
            strip(axes, place, [run[point : point + 1] for run in found.get(start, [])], curve_colour(place))
        axes.set_xticks(range(len(STARTS)), STARTS.values(), fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "images" / "evidence_starts.png", dpi=100)


if __name__ == "__main__":
    learned()
    controls()
    starts()
