"""What many massive tokens do to MIR: the paper's outlier rule and the robust one, by their share.

    python -m tests.benchmarks.masking

Correlated Gaussian tokens, three layers of width 64, 3,000 of each modality; a share of the vision tokens is 50 to
100 times as loud, as massive activations are. Range over three draws.
"""

import numpy as np
import torch

from mir_lightning.functional import modality_integration_rate

WIDTH, TOKENS, LAYERS = 64, 3000, 3


def draw(seed, share):
    """Vision and text tokens by layer."""
    rng = np.random.default_rng(seed)
    sides = ([], [])
    for _ in range(LAYERS):
        for side, mean in zip(sides, (0.3, 0.0), strict=True):
            mixing = rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
            side.append(torch.tensor(rng.standard_normal((TOKENS, WIDTH)) @ mixing + mean))
        massive = torch.tensor(rng.permutation(TOKENS)[: int(share * TOKENS)])
        sides[0][-1][massive] *= torch.tensor(rng.uniform(50, 100, (len(massive), 1)))
    return sides


def main():
    print("massive   MIR, paper's rule   MIR, robust rule")
    for share in (0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.4):
        found = [
            [modality_integration_rate(*draw(seed, share), variant).item() for seed in range(3)]
            for variant in ("paper", "robust")
        ]
        print(f"{share:7.1%}   " + "   ".join(f"{min(values):.3f} to {max(values):.3f}   " for values in found))


if __name__ == "__main__":
    main()
