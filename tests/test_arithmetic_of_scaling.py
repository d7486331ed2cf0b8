"""The arithmetic of docs/scaling.md: its table from its formulas, and these from operations counted here."""

import math
import re

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from mir_lightning.functional.frechet import _triangular_congruence
from mir_lightning.metrics import ModalityIntegrationRate
from tests.distributed import run_on_ranks
from tests.test_commands_of_the_docs import ROOT

PAGE = (ROOT / "docs/scaling.md").read_text().split("## What an evaluation costs")[1]
FORMULAS = dict(re.findall(r"^(\w+) += (.*)$", re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)[1], re.MULTILINE))


def _table(header):
    """Cells by row of the page's table with these first columns."""
    body = PAGE.split(f"| {header} |")[1].split("|---|\n")[1]
    return [line.strip("| ").split(" | ") for line in body.split("\n\n")[0].splitlines()]


MODELS = {name: {"L": int(layers), "d": int(d)} for name, layers, d in _table("model | L | d")}
CARDS = {name: [float(value) for value in values] for name, *values in _table("card | bf16, TFLOP/s")}


def _arithmetic(model, card, ranks):
    """Values of all formulas."""
    bf16, product, float64, memory, near, far = CARDS[card]
    values = {
        **MODELS[model],
        "R": ranks,
        "bf16": bf16 * 1e12,
        "product": product * 1e12,
        "float64": float64 * 1e12,
        "memory": memory * 1e12,
        "link": (near if ranks <= 8 else far) * 1e9,
        "ceil": math.ceil,
    }
    for name, formula in FORMULAS.items():
        values[name] = eval(formula, values)
    return values


def test_every_cell_is_what_the_formulas_give():
    rows = _table("model | card | ranks")
    assert [row[:3] for row in rows] == [[m, c, r] for m in MODELS for c in CARDS for r in ("1", "8", "64")]
    for model, card, ranks, *cells in rows:
        values = _arithmetic(model, card, int(ranks))
        for name, cell in zip(("forward", "products", "finalising", "reduce", "in_all"), cells, strict=True):
            assert float(cell) == pytest.approx(values[name], rel=0.006), (model, card, ranks, name)


def test_the_page_says_where_the_targets_are_met():
    every = {(m, c, r): _arithmetic(m, c, r) for m in MODELS for c in CARDS for r in (1, 8, 64)}
    assert not [row for row, values in every.items() if values["in_all"] <= (2 if row[1] == "L40S" else 1.5)]
    assert "are met nowhere in this table" in PAGE
    shares = [f"{_products(card):.1f}" for card in CARDS.values()]
    assert "{} on an A100, {} on an H100, {}\non an L40S".format(*shares) in PAGE
    assert f"would take {CARDS['L40S'][0] / CARDS['L40S'][2] / 24:.1f}" in PAGE
    assert f"costs 3 to {max(values['in_all'] for values in every.values()):.0f} forwards" in PAGE
    assert all(values["finalising"] > values["forward"] for values in every.values())
    assert all(values["reduce"] > values["forward"] for (*_, ranks), values in every.items() if ranks == 64)
    at_half = (every["7B", "A100", 1]["in_all"] - 1) / 2 + 1
    assert f"a 7B model on one A100 is at {at_half:.1f}" in PAGE


def _products(card):
    return card[0] / card[1] / 24


def _operations(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def _updated(width, tokens, updates=2):
    """Operations of accumulating tokens of one modality, once there are moments."""
    metric = ModalityIntegrationRate(1, width, accumulator=torch.float32)  # whose products are counted
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(updates, tokens, width, generator=generator)
    while not metric.vision_0_moments:
        metric.update(batches[0], batches[0][:0], layer=0)
    return _operations(lambda: [metric.update(b, b[:0], layer=0) for b in batches]) / updates


@pytest.mark.parametrize("width", [192, 384, 768])
def test_a_products_operations(width):
    """One row more than tokens an update: the old mean to the new; the tokens held back are a tenth or less."""
    tokens = 1200
    page = eval(FORMULAS["products"], {"L": 1, "T": tokens, "d": width, "product": 1})
    assert 0.85 * page < _updated(width, tokens) <= page * (tokens + 1) / tokens


def test_a_forwards_operations_and_that_products_are_a_24th():
    """Of a decoder layer with 12 d² weights, for narrow attention: two operations a weight and token."""
    d, tokens = 384, 64
    weights = [torch.randn(d, d) for _ in range(12)]
    page = eval(FORMULAS["forward"], {"L": 1, "T": tokens, "d": d, "bf16": 1})
    assert _operations(lambda: [torch.randn(tokens, d) @ w for w in weights]) == page
    for card in CARDS:
        values = _arithmetic("72B", card, 1)
        share = _products(CARDS[card])
        assert values["products"] / values["forward"] == pytest.approx(share, rel=0.03)


def test_the_congruence_takes_four_thirds_of_d_cubed():
    """All of finalising that is made of products; the Cholesky factor and the eigenvalues are LAPACK's."""
    d = 16384  # the blocks on the diagonal count less
    with torch.device("meta"):
        found = _operations(lambda: _triangular_congruence(torch.empty(d, d), torch.empty(d, d)))
    assert found == pytest.approx(4 / 3 * d**3, rel=0.03)
    layer = eval(FORMULAS["finalising"], {"layers": 1, "d": d, "float64": 1, "memory": math.inf})
    assert layer == pytest.approx(2 * (1 / 3 + 4 / 3 + 4 / 3) * d**3)


def _traffic(rank, world, width):
    """Bytes that are summed on a layer's rank, where its rules keep different tokens."""
    found, plain = [], dist.reduce

    def reduce(tensor, *args, **kwargs):
        found.append(tensor.nbytes)
        return plain(tensor, *args, **kwargs)

    metric = ModalityIntegrationRate(1, width)
    tokens = torch.randn(900, width, generator=torch.Generator().manual_seed(rank))
    tokens[:200] *= 3
    metric.update(tokens, tokens + 1, layer=0)
    dist.reduce = reduce
    try:
        metric.sync()
    finally:
        dist.reduce = plain
    classes = sum(int(len(h) > 0) for m in ("vision", "text") for h in getattr(metric, f"{m}_0_moments")[::2])
    return sum(found), classes


def test_the_bytes_of_a_reduce():
    width = 192
    ((bytes_, classes), _) = run_on_ranks(_traffic, 2, width)
    page = eval(FORMULAS["reduce"], {"R": 2, "L": 1, "d": width, "link": 1})
    assert classes == 4
    assert bytes_ / 2 == page
