"""Draws docs/images/clouds.png: two clouds of tokens, and what of their distance is norm, mean and spread.

In two dimensions, with the package's own functions; the cloud of seed 0 is drawn, ranges are of seeds 0 to 19:
python docs/figures/clouds.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse
from torch import Tensor

from mir_lightning.functional import frechet_distance

SEEDS = range(20)
VISION, TEXT = "#c2571a", "#1a6fa8"
PANELS = ["Scaled by the mean text norm", "Equally loud", "Equally loud, one centre"]
PARTS = ["norm", "mean", "spread"]

Pair = tuple[Tensor, Tensor]


def clouds(seed: int) -> Pair:
    """Vision tokens, louder and narrower, and text tokens, ``[240, 2]`` each, scaled as MIR scales them."""
    generator = torch.Generator().manual_seed(seed)
    vision, text = (torch.randn(240, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    vision = vision @ torch.tensor([[2.6, 1.4], [0.0, 0.7]]).double() + torch.tensor([8.0, 3.0])
    text = text @ torch.tensor([[0.9, -0.5], [0.0, 1.3]]).double() + torch.tensor([1.5, 3.5])
    loudness = text.norm(dim=1).mean()
    return vision / loudness, text / loudness


def stages(vision: Tensor, text: Tensor) -> list[Pair]:
    """The two clouds, with one difference after the other taken away."""
    alike = vision / vision.norm(dim=1).mean()
    return [(vision, text), (alike, text), (alike - alike.mean(dim=0) + text.mean(dim=0), text)]


def distance(pair: Pair) -> float:
    """Fréchet distance of the Gaussians fitted to two clouds."""
    vision, text = ((tokens.mean(dim=0), tokens.T.cov()) for tokens in pair)
    return frechet_distance(*vision, *text).item()


def draw(axes: Axes, pair: Pair) -> None:
    """Points, centres, and ellipses of two standard deviations."""
    for tokens, colour, name in zip(pair, (VISION, TEXT), ("vision", "text"), strict=True):
        mean, (values, vectors) = tokens.mean(dim=0), torch.linalg.eigh(tokens.T.cov())
        angle = torch.rad2deg(torch.atan2(vectors[1, 1], vectors[0, 1])).item()
        width, height = (4 * values.sqrt()).flip(0).tolist()
        axes.scatter(*tokens.T, s=4, color=colour, alpha=0.35, linewidths=0)
        axes.add_patch(Ellipse(mean.tolist(), width, height, angle=angle, fill=False, color=colour, linewidth=2))
        axes.plot(*mean, "o", color=colour, markersize=6, markeredgecolor="white", label=name)
    axes.plot(*torch.stack([tokens.mean(dim=0) for tokens in pair]).T, color="black", linestyle=":")
    axes.plot(0, 0, "+", color="black", markersize=9)
    axes.set(xticks=[], yticks=[], aspect="equal")


def main(path: Path) -> None:
    """Draw and write."""
    found = torch.tensor([[distance(pair) for pair in stages(*clouds(seed))] for seed in SEEDS])
    figure, rows = plt.subplots(2, 2, figsize=(8, 5.4), layout="constrained")
    panels = rows.flat[:3]
    for axes, title, pair, over in zip(panels, PANELS, stages(*clouds(0)), found.T, strict=True):
        draw(axes, pair)
        axes.set(xlim=(-0.5, 4.2), ylim=(-0.5, 2.2))
        axes.set_title(f"{title}: distance {over[0]:.2f}", fontsize=10, loc="left")
    panels[0].legend(title="cross: the origin", loc="lower right", fontsize=8, title_fontsize=8, frameon=False)
    shares = torch.stack([found[:, 0] - found[:, 1], found[:, 1] - found[:, 2], found[:, 2]])
    bars = rows.flat[3]
    bars.barh(PARTS, shares[:, 0], color="#7a7a7a", height=0.6)
    for place, share in enumerate(shares):
        says = f" {share[0]:.2f}  ({share.min():.2f} to {share.max():.2f} over {len(SEEDS)} draws)"
        bars.text(share[0] + 0.03, place, says, va="center", fontsize=9)
    bars.invert_yaxis()
    bars.set(xlim=(0, 1.9 * shares.max()), xticks=[])
    bars.spines[["top", "right", "bottom"]].set_visible(False)
    bars.set_title("What the distance is made of", fontsize=10, loc="left")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(__file__).parents[1] / "images" / "clouds.png")
