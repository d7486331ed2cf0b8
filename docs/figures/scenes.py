"""Draws docs/images/scenes.png: the first eight held-out scenes of OpenMoji's pictures, with captions, seed 0.

python docs/figures/scenes.py
"""

from pathlib import Path

import matplotlib.pyplot as plt

from mir_lightning.llava.demo.emoji import EmojiScenes

ATTRIBUTION = "Pictures: OpenMoji (openmoji.org), CC BY-SA 4.0"


def main() -> None:
    """Draw and save."""
    _, held_out = EmojiScenes(things=12).split(8, None, 0)
    figure, panels = plt.subplots(2, 4, figsize=(9, 5.2), layout="constrained")
    for index, panel in enumerate(panels.flat):
        sample = held_out[index]
        panel.imshow(sample.images[0])
        panel.set_title(sample.turns[1], fontsize=9)
        panel.set_axis_off()
    figure.supxlabel(ATTRIBUTION, fontsize=8)
    figure.savefig(Path(__file__).parents[1] / "images" / "scenes.png", dpi=100)


if __name__ == "__main__":
    main()
