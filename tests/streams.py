"""Hostile tokens, as real models make them and worse."""

import torch

KINDS = (
    "plain",
    "massive",
    "masked",
    "masked_vision",
    "half_massive",
    "half_equal",
    "huge_mean",
    "few_tokens",
    "constant",
    "duplicated",
)


_MASSIVE_SHARES = {"masked": 0.2, "masked_vision": 0.2, "half_massive": 0.49}


def hostile_layers(kind, dtype=torch.float32, layers=2, n_vision=700, n_text=500, d=24, seed=0, device="cpu"):
    """``(vision, text)``: lists of ``layers`` tensors ``[n, d]`` with correlated dimensions."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "few_tokens":
        n_vision, n_text = d // 2, d // 3
    modalities = []
    for n, offset in ((n_vision, 0.5), (n_text, 0.0)):
        tokens = []
        for _ in range(layers):
            mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
            x = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + offset
            if kind == "massive":
                x[torch.randperm(n, generator=generator)[: max(1, n // 100)], 0] += 1000 * x.norm(dim=1).mean()
            elif kind in _MASSIVE_SHARES and not (kind == "masked_vision" and modalities):
                chosen = torch.randperm(n, generator=generator)[: int(_MASSIVE_SHARES[kind] * n)]
                x[chosen] *= 50 + 50 * torch.rand(len(chosen), 1, generator=generator, dtype=torch.float64)
            elif kind == "half_equal":  # a little more than half of the norms are the same: no median deviation
                x[: n // 2 + 2] = x[0].roll(1) * torch.sign(torch.randn(n // 2 + 2, d, generator=generator))
                x = x[torch.randperm(n, generator=generator)]
            elif kind == "huge_mean":
                x += 1e3 * x.std()
            elif kind == "constant":
                x[:, ::3] = 1.5
            elif kind == "duplicated":
                x = x[: d // 2].repeat(n // (d // 2) + 1, 1)[:n]
            tokens.append(x.to(device, dtype))
        modalities.append(tokens)
    return modalities


def samples_of(count, tokens):
    """The sample that each of ``tokens`` is of, where ``count`` samples share them evenly."""
    return torch.arange(tokens) * count // tokens


def correlated_samples(seed, samples=80, d=12):
    """``(vision, text, vision_samples, text_samples)``: those of a sample share what it is about."""
    generator = torch.Generator().manual_seed(seed)
    constant = torch.Generator().manual_seed(99)
    sides = []
    for tokens, offset in ((9, 0.5), (6, 0.0)):
        layers = []
        for _ in range(2):
            mixing = torch.randn(d, d, generator=constant, dtype=torch.float64)
            shared = torch.randn(samples, 1, d, generator=generator, dtype=torch.float64)
            own = torch.randn(samples, tokens, d, generator=generator, dtype=torch.float64)
            layers.append(((shared + own) @ mixing + offset).flatten(0, 1))
        sides.append(layers)
    return *sides, samples_of(samples, 9 * samples), samples_of(samples, 6 * samples)


def make_massive(tokens, share, place):
    """Multiply a share of tokens ``[n, d]`` (at least one, none for 0) by 1000, in place."""
    count = min(len(tokens), max(1, int(share * len(tokens)))) if share else 0
    where = {
        "start": torch.arange(count),
        "end": torch.arange(len(tokens) - count, len(tokens)),
        "middle": torch.arange(len(tokens) // 2, len(tokens) // 2 + count),
        "spread": torch.linspace(0, len(tokens) - 1, count).long(),
    }[place]
    tokens[where] *= 1000
