"""Standard errors of MIR: influence function, jackknife and bootstrap over samples, and the truth.

    python -m tests.benchmarks.interval

Two layers of correlated tokens, 80 samples that share what each is about; the truth is the deviation over 300
fresh draws.
"""

import numpy as np

from mir_lightning.functional import mir_influence, modality_integration_rate, standard_error
from tests.streams import correlated_samples

SAMPLES = 80


def main():
    print("influence  jackknife  bootstrap")
    for seed in range(3):
        vision, text, *samples = correlated_samples(seed, SAMPLES)
        sides = [[layer.view(SAMPLES, -1, layer.shape[1]) for layer in side] for side in (vision, text)]

        def mir(chosen, sides=sides):
            return modality_integration_rate(*([layer[chosen].flatten(0, 1) for layer in s] for s in sides)).item()

        left_out = np.array([mir([j for j in range(SAMPLES) if j != i]) for i in range(SAMPLES)])
        jackknife = np.sqrt((SAMPLES - 1) * left_out.var())
        generator = np.random.default_rng(seed)
        bootstrap = np.std([mir(generator.integers(0, SAMPLES, SAMPLES)) for _ in range(300)], ddof=1)
        influence = standard_error(mir_influence(vision, text, *samples)).item()
        print(f"{influence:9.4f}  {jackknife:9.4f}  {bootstrap:9.4f}")
    drawn = [modality_integration_rate(*correlated_samples(seed, SAMPLES)[:2]).item() for seed in range(300)]
    print(f"over fresh draws: {np.std(drawn, ddof=1):.4f}")


if __name__ == "__main__":
    main()
