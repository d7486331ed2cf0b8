"""Does a reading rank runs as their score does? Rank statistics of runs that come in configurations and factors.

Runs of one configuration differ in the seed alone, so they are no independent witnesses: intervals leave out, and
permutations move, whole configurations. Every statistic follows from the signs of the differences of two runs, and
from how often each run counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mir_lightning.study import BASE, LEAST_CONFIGURATIONS, Study, lower_is_better

WITHIN, OVERALL = "within factors", "overall"
_PERMUTATIONS = 9999
# Variance of Fisher's z of n independent pairs: a / (n - b); Fieller, Hartley and Pearson (Biometrika, 1957).
_SPEARMAN, _KENDALL = (1.06, 3), (0.437, 4)


class Estimate(NamedTuple):
    """A statistic and the ends of its 95 % interval; NaN where there is nothing to rank."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """How a reading ranks the runs of a scope: a factor, all factors each for itself (``WITHIN``), or ``OVERALL``.

    Attributes:
        reading: name it was logged under.
        scope: which runs are compared with which.
        runs: that have the reading.
        configurations: that these runs are of.
        spearman: rank correlation with the score; below 0 is good where lower is better.
        p: of ``spearman``, by permutation.
        kendall: tau-b.
        decision_accuracy: share of pairs of runs whose better one the reading picks.
        partial: ``spearman`` at equal ranks of the given reading; None if none was given.
    """

    reading: str
    scope: str
    runs: int
    configurations: int
    spearman: Estimate
    p: float
    kendall: Estimate
    decision_accuracy: Estimate
    partial: Estimate | None


class Validation(NamedTuple):
    """Lines by reading and scope, signal to noise of the readings and the score, and what could not be computed."""

    lines: list[Line]
    signal_to_noise: dict[str, float]
    notes: list[str]


@dataclass(frozen=True)
class Design:
    """Which runs are compared: the run, group and configuration of each row, ``[n]``.

    Runs are ranked inside their group; a run of the base has a row in each group.
    """

    run: Tensor
    group: Tensor
    configuration: Tensor

    @classmethod
    def of(cls, study: Study, scope: str) -> Design:
        """All rows of a scope."""
        groups = {OVERALL: [set(study.factors)], WITHIN: [{name, BASE} for name in study.varied]}
        numbers = {name: number for number, name in enumerate(dict.fromkeys(study.configurations))}
        rows = [
            (run, group, numbers[study.configurations[run]])
            for group, members in enumerate(groups.get(scope, [{scope, BASE}]))
            for run, factor in enumerate(study.factors)
            if factor in members
        ]
        return cls(*torch.tensor(rows).T)

    def where(self, kept: Tensor) -> Design:
        """The rows where ``kept``, of groups that are left with enough configurations."""
        run, group, configuration = (column[kept] for column in (self.run, self.group, self.configuration))
        pairs = torch.stack([group, configuration]).unique(dim=1)
        large = pairs[0].bincount(minlength=int(self.group.max()) + 1)[group] >= LEAST_CONFIGURATIONS
        return Design(run[large], group[large], configuration[large])

    def together(self) -> Tensor:
        """Whether two rows are of one group, ``[n, n]``."""
        return (self.group[:, None] == self.group).double()

    def apart(self) -> Tensor:
        """Whether two rows are of different configurations, ``[n, n]``."""
        return (self.configuration[:, None] != self.configuration).double()


def differences(values: Tensor, together: Tensor) -> Tensor:
    """Signs of the differences of two rows ``[n, n]``, 0 where they are not compared."""
    return (values[:, None] - values).sign() * together


def rank_correlations(signs: Sequence[Tensor], together: Tensor, weights: Tensor) -> Tensor:
    """Spearman's coefficients ``[r, k, k]`` of k variables, each row as often as ``weights`` ``[r, n]`` says.

    Ranks are taken inside each group and divided by its size, so that a group counts by its rows; ties share
    their mean rank. NaN where a variable does not vary.
    """
    sizes = weights @ together
    ranks = torch.stack([weights @ of.T / sizes.clamp(min=1) for of in signs])  # from the mean rank, in halves
    products = torch.einsum("rn,krn,lrn->rkl", weights, ranks, ranks)
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    return products / (norms[:, :, None] * norms[:, None, :])


def partial_correlation(correlations: Tensor) -> Tensor:
    """Of the first two variables at equal ranks of the third, of correlations ``[r, 3, 3]``."""
    xy, xz, yz = correlations[:, 0, 1], correlations[:, 0, 2], correlations[:, 1, 2]
    unexplained = (1 - xz.square()) * (1 - yz.square())
    return torch.where(unexplained > 1e-12, (xy - xz * yz) / unexplained.sqrt(), torch.nan).clamp(-1, 1)


def pair_agreement(x: Tensor, y: Tensor, weights: Tensor, all_x: bool) -> Tensor:
    """Agreeing less disagreeing pairs, as a share, of signs ``[n, n]`` of two variables.

    Of pairs that differ in ``y``, or with ``all_x`` as Kendall's tau-b, of those and those that differ in ``x``.
    """

    def total(signs: Tensor) -> Tensor:
        return ((weights @ signs) * weights).sum(dim=-1)

    pairs = total(y.abs())
    return total(x * y) / ((pairs * total(x.abs())).sqrt() if all_x else pairs)


def interval(
    statistic: Callable[[Tensor], Tensor], design: Design, noise: tuple[float, int] = _SPEARMAN
) -> Estimate:
    """A statistic in [-1, 1] with its 95 % interval, from leaving out each configuration in turn (jackknife).

    Fisher's z of the statistic, its standard error, and Student's quantile with as many degrees of freedom as
    configurations less groups. The error is at least ``noise``, that of independent runs, so that a perfect order
    of few runs is not taken for certain. Where a configuration decides alone whether there is an order at all,
    the interval is the whole range.

    Args:
        statistic: its values ``[r]`` for weights of the rows ``[r, n]``.
        design: the rows.
        noise: variance of z of independent runs, a and b of ``a / (runs - b)``.
    """
    ids, configuration = design.configuration.unique(return_inverse=True)
    member = torch.zeros(len(ids), int(design.group.max()) + 1)
    member[configuration, design.group] = 1
    peers = (member @ member.T > 0).sum(dim=1)  # a configuration's share is left out of as many
    value = statistic(torch.ones(1, len(design.run), dtype=torch.float64))
    runs, freedom = len(design.run.unique()), len(ids) - len(design.group.unique())
    if value.isnan() or freedom < 1 or runs <= noise[1]:
        return Estimate(value.item(), *((math.nan,) * 2 if value.isnan() else (-1.0, 1.0)))
    left_out = statistic((ids[:, None] != design.configuration).double())
    limit = 1 - 1 / runs**2
    z, others = (each.clamp(-limit, limit).atanh() for each in (value, left_out))
    variance = ((1 - 1 / peers) * (others - z).square()).sum().clamp(min=noise[0] / (runs - noise[1]))
    reach = _student(freedom) * variance.sqrt()
    if reach.isnan():
        return Estimate(value.item(), -1.0, 1.0)
    low, high = (z - reach).tanh(), (z + reach).tanh()
    return Estimate(value.item(), min(low, value).item(), max(high, value).item())


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution; an ``ImportError`` without SciPy names the extra."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError('rank statistics need SciPy: pip install "mir-lightning[recipes]"') from error
    return float(t.ppf(0.975, freedom))


def permutation_p(x: Tensor, y: Tensor, design: Design, strata: Tensor, seed: int = 0) -> float:
    """How often |Spearman's coefficient| is as large where the scores are dealt anew among configurations.

    Exchangeable, if the reading knows nothing of the score, are the configurations of a stratum that have equally
    many runs, each with all its scores in the order of the seeds; others stay where they are.

    Args:
        x: signs of the reading's differences, ``[n, n]``.
        y: the score's.
        design: the rows.
        strata: of the rows, ``[n]``.
        seed: of the 9999 permutations.
    """
    sizes = design.together().sum(dim=1)
    ranks_x, ranks_y = x.sum(dim=1) / sizes, y.sum(dim=1) / sizes
    generator = torch.Generator().manual_seed(seed)
    blocks: dict[tuple[int, ...], list[Tensor]] = {}
    for configuration in design.configuration.unique():
        rows = (design.configuration == configuration).nonzero().flatten()
        blocks.setdefault((int(strata[rows[0]]), len(rows)), []).append(rows)
    dealt = torch.arange(len(x)).repeat(_PERMUTATIONS, 1)
    for places in map(torch.stack, blocks.values()):
        order = torch.rand(_PERMUTATIONS, len(places), generator=generator).argsort(dim=1)
        dealt[:, places.flatten()] = places[order].flatten(start_dim=1)
    observed, null = (ranks_x @ ranks_y).abs(), (ranks_y[dealt] @ ranks_x).abs()
    return (1 + int((null >= observed - 1e-9).sum())) / (1 + _PERMUTATIONS)


def signal_to_noise(values: Tensor, configurations: Sequence[str]) -> float:
    """Standard deviation of the configurations' means over that of runs inside them; NaN without second seeds."""
    names = list(dict.fromkeys(configurations))
    of = [values[[name == each for each in configurations]] for name in names]
    of = [each[~each.isnan()] for each in of]
    inside = [(each - each.mean()).square().sum() for each in of if len(each) > 1]
    freedom = sum(len(each) - 1 for each in of if len(each))
    means = torch.stack([each.mean() for each in of if len(each)])
    return float(means.std() / (sum(inside) / freedom) ** 0.5) if freedom else math.nan


def rank_line(study: Study, reading: str, scope: str, given: str | None = None) -> Line | None:
    """All statistics of a reading in a scope; None where too few configurations have it."""
    values = study.readings[reading]
    everything = Design.of(study, scope)
    design = everything.where(~values[everything.run].isnan())
    if not len(design.run):
        return None
    together, apart = design.together(), design.apart()
    x, y = (differences(each[design.run], together) for each in (values, study.score))
    better = -x if lower_is_better(reading) else x
    own = list(dict.fromkeys(study.factors))
    strata = torch.tensor([own.index(factor) if scope == WITHIN else 0 for factor in study.factors])
    gamma = interval(lambda weights: pair_agreement(better * apart, y * apart, weights, False), design, _KENDALL)
    return Line(
        reading,
        scope,
        len(design.run.unique()),
        len(design.configuration.unique()),
        interval(lambda weights: rank_correlations([x, y], together, weights)[:, 0, 1], design),
        permutation_p(x, y, design, strata[design.run]),
        interval(lambda weights: pair_agreement(x, y, weights, True), design, _KENDALL),
        Estimate(*((1 + end) / 2 for end in gamma)),
        None if given is None else _partial(study, reading, given, design),
    )


def _partial(study: Study, reading: str, given: str, design: Design) -> Estimate:
    """At equal ranks of the given reading, over the runs that have it too."""
    design = design.where(~study.readings[given][design.run].isnan())
    if not len(design.run) or reading == given:
        return Estimate(math.nan, math.nan, math.nan)
    together = design.together()
    columns = (study.readings[reading], study.score, study.readings[given])
    signs = [differences(each[design.run], together) for each in columns]
    correlations = partial_correlation
    return interval(lambda weights: correlations(rank_correlations(signs, together, weights)), design)


def validate(study: Study, given: str | None = None) -> Validation:
    """Every reading in every scope.

    Raises:
        ValueError: if there is no reading, or none is called ``given``.
    """
    if not study.readings:
        raise ValueError("the study has no reading: there is no column beside the runs' description and score.")
    if given is not None and given not in study.readings:
        raise ValueError(f"given: there is no reading {given!r}; there are {', '.join(study.readings)}.")
    lines, notes = [], []
    for reading in study.readings:
        if lower_is_better(reading) is None:
            notes.append(f"{reading}: higher is taken as better, as nothing is known of that name")
        for scope in (WITHIN, OVERALL, *study.varied):
            if line := rank_line(study, reading, scope, given):
                lines.append(line)
            else:
                notes.append(
                    f"{reading}, {scope}: left out, it is of fewer than {LEAST_CONFIGURATIONS} configurations"
                )
    measured = {"score": study.score, **study.readings}
    noise = {name: signal_to_noise(values, study.configurations) for name, values in measured.items()}
    return Validation(lines, noise, notes)
