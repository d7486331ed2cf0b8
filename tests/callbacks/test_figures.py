"""Nothing that is drawn in fixed margins leaves the picture, however wide its numbers are."""

from types import SimpleNamespace

import pytest
import torch

from mir_lightning.callbacks import figures


def _layers(scale):
    gaps = scale * (0.45 + torch.rand(30, generator=torch.Generator().manual_seed(0)))
    return {"mean_gap": gaps, "cov_gap": 2 * gaps, "norm_ratio": gaps, "layers": 3 * gaps}


def _tokens(scale):
    generator = torch.Generator().manual_seed(0)
    sample = tuple(scale * torch.randn(40, 16, generator=generator) for _ in range(2))
    return SimpleNamespace(sample=sample, sample_layer=15, **_layers(scale))


DRAWN = {
    "layers": lambda scale: figures.layer_figure(_layers(scale), "Step 100,000: MIR 1.2345"),
    "comparison": lambda scale: figures.layer_comparison_figure({"a model": _layers(scale)["layers"].tolist()}),
    "heatmap": lambda scale: figures.heatmap_figure(
        [100_000, 200_000], [(n * _layers(scale)["layers"]).tolist() for n in (1, 2)]
    ),
    "tokens": lambda scale: figures.token_figure(_tokens(scale), 100_000),
    "gain": lambda scale: figures.gain_figure(
        [(n * 100_000, n * scale, scale, n * scale, scale) for n in range(5)]
    ),
    "overview": lambda scale: figures.overview_figure(
        [{"step": n * 100_000, "gain": n * scale, "gain_error": scale, "mir": -n * scale} for n in range(5)],
        _tokens(scale),
        100_000,
    ),
    "abilities": lambda scale: figures.ability_figure([0, 100_000], {"perception": [(scale, 0.25), (0.3, 0.25)]}),
}


@pytest.mark.parametrize("scale", [1e-4, 0.3, 1.0, 2e4])
@pytest.mark.parametrize("name", DRAWN)
def test_nothing_is_cut_off(name, scale):
    figure = DRAWN[name](scale)
    width, height = figure.get_size_inches()
    drawn = figure.get_tightbbox()
    assert drawn.x0 >= 0
    assert drawn.y0 >= 0
    assert drawn.x1 <= width
    assert drawn.y1 <= height
