"""The statistics of a study against SciPy, definitions written anew, and populations that are known."""

import csv
import itertools
import json
import math
import sys

import numpy as np
import pytest
import scipy.stats
import torch

from mir_lightning import cli
from mir_lightning.study import Study, lower_is_better, read_study
from mir_lightning.validation import (
    OVERALL,
    WITHIN,
    Design,
    permutation_p,
    rank_line,
    signal_to_noise,
    spearman,
    validate,
)


def _draw(rng, factors=4, each=6, seeds=3, rho=0.0, noise=0.5, base=False, shift=0.0):
    """Configurations' effects on reading and score correlate as ``rho``; factors are ``shift`` apart."""
    names = [(f"f{factor}", f"f{factor}-c{number}") for factor in range(factors) for number in range(each)]
    names += [("base", "base")] * base
    own = np.array([int(factor[1:]) if factor != "base" else 0 for factor, _ in names])
    effects = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], len(names)) + shift * own[:, None]
    values = np.repeat(effects, seeds, axis=0) + noise * rng.normal(size=(len(names) * seeds, 2))
    reading, score = torch.from_numpy(values).T
    runs = [name for name in names for _ in range(seeds)]
    return Study([name for _, name in runs], [factor for factor, _ in runs], score, {"image_gain": reading})


def _of(study, scope, reading="image_gain"):
    design = Design.of(study, scope)
    return spearman([study.readings[reading], study.score], design)


def _write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def _rows(study=None):
    study = study or _draw(np.random.default_rng(0), factors=2, each=4, seeds=2, rho=0.8, base=True)
    rows = []
    for place, (configuration, factor) in enumerate(zip(study.configurations, study.factors, strict=True)):
        row = {"run": f"r{place}", "configuration": configuration, "factor": factor, "seed": place % 2, "step": 9}
        row |= {name: values[place].item() for name, values in study.readings.items()}
        rows.append(row | {"score": study.score[place].item()})
    return rows


@pytest.mark.parametrize("scope", [OVERALL, "f1"])
def test_correlations_are_scipys_with_ties_too(scope):
    study = _draw(np.random.default_rng(1), base=True, rho=0.6)
    study.readings["image_gain"].mul_(2).round_()
    line = rank_line(study, "image_gain", scope)
    rows = Design.of(study, scope).run
    x, y = study.readings["image_gain"][rows], study.score[rows]
    assert line.spearman.value == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert line.kendall.value == pytest.approx(scipy.stats.kendalltau(x, y).statistic)
    assert (line.runs, line.configurations) == (len(rows), len(rows) // 3)


def test_within_factors_is_the_correlation_of_ranks_taken_in_each():
    study = _draw(np.random.default_rng(2), factors=3, each=4, base=True, shift=2)
    pooled = [], []
    for factor in study.varied:
        rows = Design.of(study, factor).run
        for ranks, values in zip(pooled, (study.readings["image_gain"], study.score), strict=True):
            ranks.extend(scipy.stats.rankdata(values[rows]))
    assert _of(study, WITHIN).value == pytest.approx(scipy.stats.pearsonr(*pooled).statistic)


def test_the_interval_is_of_a_jackknife_over_configurations():
    study = _draw(np.random.default_rng(3), factors=1, each=9, rho=0.7)
    x, y, names = study.readings["image_gain"].numpy(), study.score.numpy(), np.array(study.configurations)
    whole = np.arctanh(scipy.stats.spearmanr(x, y).statistic)
    left_out = [
        np.arctanh(scipy.stats.spearmanr(x[names != name], y[names != name]).statistic)
        for name in np.unique(names)
    ]
    reach = scipy.stats.t.ppf(0.975, 8) * np.sqrt(8 / 9 * np.square(left_out - np.mean(left_out)).sum())
    found = _of(study, OVERALL)
    assert (found.low, found.high) == pytest.approx(np.tanh([whole - reach, whole + reach]))


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize(("rho", "noise"), [(0.0, 0.5), (0.6, 0.5), (0.9, 0.3), (0.5, 1.5)])
def test_intervals_cover_the_population(rho, noise, base):
    """24 configurations of 3 seeds; overall the population's Spearman is known in closed form."""
    rng = np.random.default_rng(4)
    studies = [_draw(rng, factors=4, each=6, rho=rho, noise=noise, base=base) for _ in range(200)]
    for scope in (OVERALL, WITHIN):
        found = [_of(study, scope) for study in studies]
        population = 6 / math.pi * math.asin(rho / (1 + noise**2) / 2)
        if scope == WITHIN:  # of few runs the expected rank correlation is smaller than the population's
            more = (_draw(rng, factors=60, each=6, rho=rho, noise=noise) for _ in range(8))
            population = np.mean([rank_of(study, WITHIN) for study in more])
        covered = np.mean([each.low <= population <= each.high for each in found])
        assert 0.90 <= covered <= 0.995, (scope, covered)


def rank_of(study, scope):
    """Value alone, without its interval."""
    x, y = study.readings["image_gain"].numpy(), study.score.numpy()
    groups = [np.array(study.factors) == factor for factor in study.varied] if scope == WITHIN else [slice(None)]
    ranks = [np.concatenate([scipy.stats.rankdata(values[group]) for group in groups]) for values in (x, y)]
    within = np.concatenate([np.full(len(x[group]), number) for number, group in enumerate(groups)])
    means = [np.bincount(within, each) / np.bincount(within) for each in ranks]
    return np.corrcoef(*(each - mean[within] for each, mean in zip(ranks, means, strict=True)))[0, 1]


def test_a_perfect_order_of_few_configurations_is_not_certain():
    score = torch.arange(4.0)
    study = Study(list("abcd"), ["f"] * 4, score, {"image_gain": score})
    line = rank_line(study, "image_gain", OVERALL)
    for estimate in (line.spearman, line.kendall, line.decision_accuracy):
        assert estimate.value == pytest.approx(1)
    assert line.spearman.low < -0.5
    assert line.decision_accuracy.low == 0  # no pair of runs is left to tell its noise
    assert line.p == pytest.approx(2 / 24, abs=0.01)  # of 24 orders this and its reverse
    assert validate(study).notes == ["signal to noise: unknown, as no configuration has two runs"]


@pytest.mark.parametrize("scope", [OVERALL, WITHIN])
def test_p_is_uniform_where_seeds_share_their_configuration(scope):
    """Dealing the scores among runs, as if seeds were independent, finds what is not there."""
    rng = np.random.default_rng(5)
    ours, naive = [], []
    for _ in range(120):
        study = _draw(rng, factors=3, each=5, noise=0.3, base=scope == WITHIN)
        for found, as_if in ((ours, None), (naive, torch.arange(len(study.score)))):
            design = Design.of(study, scope)
            if as_if is not None:
                design = Design(design.run, design.group, as_if[design.run], design.factor)
            x, y = (design.differences(values) for values in (study.readings["image_gain"], study.score))
            found.append(permutation_p(x, y, design, stratified=scope == WITHIN))
    assert scipy.stats.kstest(ours, "uniform").pvalue > 0.01
    assert np.mean(np.array(ours) < 0.05) < 0.1
    assert np.mean(np.array(naive) < 0.05) > 0.13


def test_p_is_scipys_where_each_run_is_a_configuration():
    rng = np.random.default_rng(6)
    values = torch.from_numpy(rng.normal(size=(2, 6)))
    design = Design.of(Study(list("abcdef"), ["f"] * 6, values[1], {}), OVERALL)
    exact = scipy.stats.permutation_test(
        [values[0].numpy()],
        lambda x: scipy.stats.spearmanr(x, values[1]).statistic,
        permutation_type="pairings",
        n_resamples=np.inf,
    )
    found = permutation_p(*map(design.differences, values), design, stratified=False)
    assert found == pytest.approx(exact.pvalue, abs=0.02)


def test_within_factors_scores_stay_in_their_factor_and_the_base_with_the_base():
    """Each factor in perfect order: of (4!)^2 deals this and its reverse are as strong; of (3!)^2 this alone."""
    score = torch.arange(8.0)
    study = Study(list("abcdefgh"), ["f"] * 4 + ["g"] * 4, score, {"image_gain": score})
    assert rank_line(study, "image_gain", WITHIN).p == pytest.approx(2 / 24**2, abs=0.0018)
    score = torch.arange(7.0)
    study = Study(list("abcdefg"), ["base"] + ["f"] * 3 + ["g"] * 3, score, {"image_gain": score})
    assert rank_line(study, "image_gain", WITHIN).p == pytest.approx(1 / 6**2, abs=0.006)


def test_configurations_of_other_numbers_of_seeds_stay_where_they_are():
    study = _draw(np.random.default_rng(7), factors=1, each=4, seeds=2, rho=0.9)
    kept = [0, 1, 2, 3, 4, 5, 6]  # the last configuration has one seed, so three of them can be dealt
    reading = study.score[kept]
    study = Study([study.configurations[i] for i in kept], ["f0"] * 7, study.score[kept], {"image_gain": reading})
    assert rank_line(study, "image_gain", OVERALL).p > 1 / 6 - 0.02


def test_nothing_is_left_of_a_reading_that_follows_the_loss():
    rng, partial, plain = np.random.default_rng(8), [], []
    for _ in range(60):
        study = _draw(rng, factors=1, each=24)
        loss = torch.from_numpy(np.repeat(rng.normal(size=24), 3))
        mir, score = loss + study.readings["image_gain"], study.score - loss
        design = Design.of(study, OVERALL)
        plain.append(spearman([mir, score], design).value)
        partial.append(spearman([mir, score, loss], design))
    assert np.mean(plain) < -0.35
    assert abs(np.mean([each.value for each in partial])) < 0.05
    assert np.mean([each.low <= 0 <= each.high for each in partial]) >= 0.88


def test_partial_correlation_is_that_of_what_the_given_ranks_leave():
    study = _draw(np.random.default_rng(9), factors=1, each=8, rho=0.6)
    study.readings["mir_probe/loss"] = -study.score + 0.7 * torch.randn(
        24, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    x, y, z = (
        scipy.stats.rankdata(values)
        for values in (study.readings["image_gain"], study.score, study.readings["mir_probe/loss"])
    )
    left = [scipy.stats.linregress(z, each) for each in (x, y)]
    expected = scipy.stats.pearsonr(
        *(each - line.slope * z - line.intercept for each, line in zip((x, y), left, strict=True))
    )
    lines = {line.reading: line for line in validate(study, "mir_probe/loss").lines if line.scope == OVERALL}
    assert lines["image_gain"].partial.value == pytest.approx(expected.statistic)
    assert math.isnan(lines["mir_probe/loss"].partial.value)


def test_what_factors_make_is_not_seen_within_them():
    """Simpson's paradox: factors raise reading and score alike, inside them neither knows of the other."""
    rng, within = np.random.default_rng(10), []
    for _ in range(30):
        study = _draw(rng, shift=4)
        lines = {line.scope: line for line in (rank_line(study, "image_gain", each) for each in (OVERALL, WITHIN))}
        assert lines[OVERALL].spearman.low > 0.7
        within.append(lines[WITHIN].spearman.value)
    assert abs(np.mean(within)) < 0.1


@pytest.mark.parametrize("scope", [OVERALL, WITHIN])
@pytest.mark.parametrize("reading", ["mir", "image_gain"])
def test_decision_accuracy_counts_pairs(scope, reading):
    study = _draw(np.random.default_rng(11), factors=2, each=4, rho=0.4, base=True)
    values = study.readings.pop("image_gain").mul(2).round()
    study.readings[reading], study.score[:] = values, study.score.mul(3).round()
    groups = [set(study.factors)] if scope == OVERALL else [{factor, "base"} for factor in study.varied]
    right, pairs = 0.0, 0
    for group in groups:
        runs = [place for place, factor in enumerate(study.factors) if factor in group]
        for one, other in itertools.combinations(runs, 2):
            if study.configurations[one] == study.configurations[other] or study.score[one] == study.score[other]:
                continue
            better, worse = (one, other) if study.score[one] > study.score[other] else (other, one)
            ahead = values[worse] - values[better] if reading == "mir" else values[better] - values[worse]
            right, pairs = right + (1.0 if ahead > 0 else 0.5 if ahead == 0 else 0.0), pairs + 1
    assert rank_line(study, reading, scope).decision_accuracy.value == pytest.approx(right / pairs)


def test_signal_to_noise_is_of_means_over_seeds():
    values = torch.tensor(
        [1.0, 3.0, 11.0, 13.0, 6.0, math.nan]
    )  # means 2, 12, 6; two seeds each 1 from their mean
    assert signal_to_noise(values, list("aabbcc")) == pytest.approx(np.std([2, 12, 6], ddof=1) / np.sqrt(2))
    assert math.isnan(signal_to_noise(values[:2], list("ab")))


@pytest.mark.parametrize(
    ("reading", "lower"),
    [
        ("mir", True),
        ("mir_official_fast", True),
        ("mir_probe/loss", True),
        ("mir_norm/mean", True),
        ("mir_rank/vision", False),
        ("image_gain", False),
        ("sds_abilities/perception", False),
        ("few_shot/em_4", False),
        ("mirror", None),
        ("mean_gap", None),
    ],
)
def test_directions_are_fixed_beforehand(reading, lower):
    assert lower_is_better(reading) is lower


def test_what_cannot_be_said_is_said():
    study = _draw(np.random.default_rng(12), factors=2, each=4, base=True)
    study.readings["other"] = study.readings["image_gain"].clone()
    study.readings["other"][: 2 * 3] = math.nan  # of f0, with the base, three are left
    found = validate(study)
    assert found.notes == [
        "other: higher is taken as better, as nothing is known of that name",
        "other, f0: left out, of fewer than 4 configurations",
    ]
    lines = {(line.reading, line.scope): line for line in found.lines}
    assert ("other", "f0") not in lines
    assert lines["other", WITHIN].spearman == lines["other", "f1"].spearman  # f0's three are not in it either
    assert lines["other", OVERALL].runs == 21


def test_a_reading_that_stands_still_in_a_factor_ranks_nothing_there():
    study = _draw(np.random.default_rng(13), factors=2, each=4)
    study.readings["image_gain"][:12] = 1.0
    line = rank_line(study, "image_gain", "f0")
    assert math.isnan(line.spearman.value)
    assert line.decision_accuracy.value == 0.5
    assert line.p == 1


def test_the_last_value_of_each_column_counts(tmp_path):
    rows = _rows()
    early = {**rows[0], "step": 3, "image_gain": 70, "score": ""}
    late = {**rows[0], "step": 12, "image_gain": "", "score": 5}
    study = read_study(_write(tmp_path / "a.csv", [late, *rows, early]))
    place = study.configurations.index(rows[0]["configuration"])
    assert study.readings["image_gain"][place].item() == pytest.approx(rows[0]["image_gain"])
    assert study.score[place] == 5
    assert list(study.configurations) == sorted(row["configuration"] for row in rows)


def _without(rows, *names):
    return [{key: value for key, value in row.items() if key not in names} for row in rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: _without(rows, "seed", "score"),
            "study.csv lacks the column seed, score, or any row",
        ),
        (lambda rows: [{**rows[0], "seed": 8}, *rows], "row 2: r0 is f0-c0, f0, 0, and was f0-c0, f0, 8 before"),
        (lambda rows: [{**rows[0], "run": ""}], "row 1: run is empty"),
        (lambda rows: [{**rows[0], "step": ""}], "row 1: step is empty"),
        (lambda rows: [{**rows[0], "step": "x"}], "row 1: step must be a finite number, or empty"),
        (lambda rows: [*rows, {**rows[0], "image_gain": "n/a"}], "row 19: image_gain must be .*, got 'n/a'"),
        (lambda rows: [{**rows[0], "image_gain": "nan"}], "row 1: image_gain must be .*, got 'nan'"),
        (lambda rows: [*rows[:-1], {**rows[-1], "score": ""}], "r17 has no score; give it one, or leave"),
        (lambda rows: [{**row, "score": 2.5} for row in rows], "score is 2.5 in all runs and ranks none"),
        (lambda rows: [*rows[:-1], {**rows[-1], "factor": "f1"}], "base, of r17, is of two factors, base and f1"),
        (lambda rows: rows[:6], "4 configurations are needed, got f0-c0, f0-c1, f0-c2"),
    ],
)
def test_a_damaged_table_is_told_where(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_study(_write(tmp_path / "study.csv", change(_rows())))


@pytest.mark.parametrize("line", ["r,a,f,0,1,2,3,4", "r,a,f,0"])
def test_lines_of_another_length_are_refused(tmp_path, line):
    (tmp_path / "a.csv").write_text(f"run,configuration,factor,seed,step,mir,score\n{line}\n")
    with pytest.raises(ValueError, match="row 1: it has another number of cells than the first line"):
        read_study(tmp_path / "a.csv")


def test_a_study_without_readings_is_refused():
    study = _draw(np.random.default_rng(16))
    with pytest.raises(ValueError, match="must be a reading of the study, got None; it has none, as no column is"):
        validate(Study(study.configurations, study.factors, study.score, {}))
    empty = {"mir": torch.full_like(study.score, math.nan)}
    with pytest.raises(ValueError, match="no reading with enough runs: mir, within factors: left out, of fewer"):
        validate(Study(study.configurations, study.factors, study.score, empty))


def test_a_reading_that_is_the_same_everywhere_is_left_out_and_said():
    study = _draw(np.random.default_rng(17), factors=2, each=4)
    study.readings["sds"] = torch.full_like(study.score, 0.25)
    study.readings["sds"][3] = math.nan
    found = validate(study)
    assert {line.reading for line in found.lines} == {"image_gain"} == found.signal_to_noise.keys() - {"score"}
    assert "sds: left out, as it is 0.25 wherever it was measured" in found.notes


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r'pip install "mir-lightning\[recipes\]"'):
        _of(_draw(np.random.default_rng(14)), OVERALL)


def test_the_command_prints_writes_and_draws(tmp_path, capsys):
    rng = np.random.default_rng(15)
    study = _draw(rng, factors=2, each=4, rho=0.9, noise=0.2, base=True)
    study.readings["mir"] = -study.readings["image_gain"] + torch.from_numpy(rng.normal(size=27))
    rows = [{**row, "score/counting": row["score"] / 2} for row in _rows(study)]
    table = _write(tmp_path / "study.csv", rows)
    files = {name: tmp_path / f"out.{name}" for name in ("html", "json", "png")}
    arguments = ["--html", files["html"], "--json", files["json"], "--plot", files["png"], "--given", "mir"]
    assert cli.main(["report", "--validate", str(table), *map(str, arguments)]) == 0
    output = capsys.readouterr().out
    record = json.loads(files["json"].read_text())
    first = record["lines"][0]
    assert (first["reading"], first["scope"], first["better"]) == ("image_gain", WITHIN, "higher")
    shown = f"{first['spearman']['value']:.2f} [{first['spearman']['low']:.2f}, {first['spearman']['high']:.2f}]"
    for text in (output, files["html"].read_text()):
        assert shown in text
        assert "rho within at equal mir" in text
        assert "score/counting" not in text  # a score, no reading
    assert next(line for line in record["lines"] if line["reading"] == "mir")["partial"]["value"] is None
    assert files["png"].stat().st_size > 20_000
    assert cli.main(["report", "--validate", str(table), "--readings", "mir"]) == 0
    assert "image_gain" not in capsys.readouterr().out
    assert cli.main(["report", "--validate", str(table), "--score", "score/counting", "--given", "loss"]) == 1
    assert "given: must be a reading of the study, got 'loss'; it has image_gain, mir" in capsys.readouterr().err
