"""How far the released script's default mode is from the exact distance, by how loud the vision tokens are.

    python -m tests.benchmarks.default_mode

Gaussian tokens with spectra that fall over two and over four decades, in directions of their own; a layer's
distance in percent above the exact one, range over three draws and both spectra.
"""

import numpy as np
import torch

from mir_lightning.functional import modality_integration_rate

WIDTH, TOKENS = 256, 3000


def draw(seed, decades, loudness):
    """Vision and text tokens whose mean norms have the ratio ``loudness``."""
    rng = np.random.default_rng(seed)
    spectrum = np.logspace(0, -decades / 2, WIDTH)
    clouds = []
    for mean in (0.3, 0.0):
        rotation = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
        tokens = (rng.standard_normal((TOKENS, WIDTH)) * spectrum) @ rotation + mean * rng.standard_normal(WIDTH)
        clouds.append(tokens / np.linalg.norm(tokens, axis=1).mean())
    clouds[0] *= loudness
    return (torch.tensor(cloud, dtype=torch.float32) for cloud in clouds)


def main():
    print("norm ratio   default mode above the exact distance")
    for loudness in (1, 2, 5, 10, 20):
        excess = []
        for decades in (2, 4):
            for seed in range(3):
                vision, text = draw(seed, decades, loudness)
                exact, default = (
                    modality_integration_rate([vision], [text], variant, return_layers=True)[1].item()
                    for variant in ("official", "official-fast")
                )
                excess.append(100 * (default / exact - 1))
        print(f"{loudness:>10}   {min(excess):.0f} to {max(excess):.0f} %")


if __name__ == "__main__":
    main()
