import csv
import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import scipy.stats

from mir_lightning import cli
from mir_lightning.page import html_page
from mir_lightning.report import Run, correlations, read_run, report_figure, report_page, report_panels


def _write_run(folder, mir, scores=(0.2, 0.5), extra=()):
    folder.mkdir(parents=True)
    names = [
        "step",
        "mir",
        "train/loss",
        "sds_abilities/perception",
        "sds_abilities/reasoning",
        "sds_chance_abilities/perception",
        "sds_chance_abilities/reasoning",
        "mir_probe/perplexity",
        *extra,
    ]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for step, value in enumerate(mir):
            writer.writerow({"step": step, "train/loss": 3 - step})
            sds = {"sds_abilities/perception": scores[0], "sds_abilities/reasoning": scores[1]}
            sds |= {"sds_chance_abilities/perception": 0.25, "sds_chance_abilities/reasoning": 0.4}
            writer.writerow(
                {"step": step, "mir": value, "mir_probe/perplexity": 9.0, **sds, **dict.fromkeys(extra, 1)}
            )
    return folder


def test_curves_of_csv_and_of_a_trainer_state(tmp_path):
    run = read_run(_write_run(tmp_path / "a" / "csv" / "version_0", [1.5, 1.25]).parents[1])
    assert run.name == "a"
    assert run.curves["mir"] == [(0, 1.5), (1, 1.25)]
    assert run.curves["train/loss"] == [(0, 3.0), (1, 2.0)]
    state = {"log_history": [{"step": 0, "mir": 2.0, "epoch": 0.0}, {"step": 5, "loss": 1.0, "note": "x"}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    run = read_run(tmp_path / "trainer_state.json")
    assert run.curves == {"mir": [(0, 2.0)], "loss": [(5, 1.0)]}


def test_a_resumed_run_is_shown_whole_and_one_before_it_is_not(tmp_path):
    """Version 0 is a run of its own; 1, 2 and 3 one that was interrupted twice, the first time before step 2."""
    pieces = [
        [(0, 9.0), (4, 9.0), (8, 9.0)],
        [(0, 1.5), (2, 1.4), (3, 1.3)],
        [(2, 1.4), (3, 1.2), (4, 1.1)],
        [(6, 1.0)],
    ]
    for version, points in enumerate(pieces):
        folder = tmp_path / "csv" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("\n".join(["step,mir", *(f"{s},{v}" for s, v in points)]))
        os.utime(folder / "metrics.csv", (version, version))
    assert read_run(tmp_path).curves == {"mir": [(0, 1.5), (2, 1.4), (3, 1.2), (4, 1.1), (6, 1.0)]}


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"is no run: there is no metrics\.csv"):
        read_run(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,mir\n")
    with pytest.raises(ValueError, match="holds no curve"):
        read_run(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no trainer_state\.json"):
        read_run(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.csv", "step,mir\n1,1.5\nx,1.4\n", "row 2: the step must be a finite number, got 'x'"),
        ("metrics.csv", "step,mir\nnan,1.5\n", "row 1: the step must be a finite number, got 'nan'"),
        ("metrics.csv", "step,mir\n\x8f\n", "is no CSV file: "),
        ("metrics.csv", "step,mir\n0,nan\n1,inf\n2,1e308\n3,-1e308\n", "holds no curve"),
        ("a.json", "[1]", "is no trainer_state.json: it must be an object, got"),
        (
            "a.json",
            '{"log_history": 3}',
            "is no trainer_state.json: log_history must be a list of one or more, got 3",
        ),
        ("a.json", '{"log_history": [3]}', r"is no trainer_state.json: log_history\[0\] must be an object, got 3"),
        (
            "a.json",
            '{"log_history": [{"step": [], "mir": 1}]}',
            r"row 1: the step must be a finite number, got \[\]",
        ),
        (
            "a.json",
            f'{{"log_history": [{{"step": {10**400}}}]}}',
            "row 1: the step must be a finite number, got 10+",
        ),
        ("a.JSON", "{", "is not JSON"),
    ],
)
def test_damaged_files_are_named_with_the_field(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name},? {message}"):
        read_run(tmp_path / name)


def test_damaged_scores_are_named(tmp_path, capsys):
    folders = [str(_write_run(tmp_path / f"run{i}", [1.5])) for i in range(3)]
    for content, message in (
        ("[]", "it must be an object"),
        ('{"run0": "x"}', "run0 must be a number within 1e+300"),
    ):
        (tmp_path / "scores.json").write_text(content)
        assert cli.main(["report", *folders, "--score", str(tmp_path / "scores.json")]) == 1
        assert f"scores.json must hold an object of run names and numbers: {message}" in capsys.readouterr().err


def test_panels_of_what_there_is(tmp_path):
    figure = report_figure([read_run(_write_run(tmp_path / "a", [1.5, 1.25]))])
    titles = [axes.get_title() for axes in figure.axes if axes.axison]
    assert titles == ["Are the modalities apart? MIR", "Soft Discrimination Score", "Loss", "Held-out perplexity"]
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert labels == ["sds_abilities/perception", "sds_abilities/reasoning", "chance"]
    assert [line.get_ydata()[0] for line in figure.axes[1].lines[-2:]] == [0.25, 0.4]  # of each ability
    assert list(figure.axes[0].lines[0].get_ydata()) == [1.5, 1.25]


def test_one_legend_tells_the_runs_apart(tmp_path):
    figure = report_figure([read_run(_write_run(tmp_path / name, [1.5, 1.25])) for name in ("a", "b")])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert [line.get_color() for line in legend.get_lines()] == [line.get_color() for line in figure.axes[0].lines]
    assert figure.axes[0].get_legend() is None


def test_names_are_shown_as_they_are(tmp_path):
    names = ["$a_{1}$", "_b<i>", "\udcff"]
    runs = [Run(name, {"mir": [(0, 1.0), (1, 0.5)]}) for name in names]
    figure = report_figure(runs)
    shown = [text._preprocess_math(text.get_text()) for text in figure.legends[0].get_texts()]
    assert shown == [(name, False) for name in (*names[:2], r"\udcff")]
    assert "_b&lt;i&gt;" in report_page(runs, [], "")


def test_rank_correlations_against_scipy():
    rng = np.random.default_rng(0)
    mir, loss = rng.normal(size=(2, 9)).round(1)
    score = {f"r{i}": float(-mir[i] + 0.3 * loss[i]) for i in range(9)}
    runs = [Run(f"r{i}", {"mir": [(0, 9.0), (1, mir[i])], "train/loss": [(1, loss[i])]}) for i in range(9)]
    rows = {row.metric: row for row in correlations(runs, score)}
    for name, values in (("mir", mir), ("train/loss", loss)):
        expected = scipy.stats.spearmanr(values, list(score.values())).statistic
        assert rows[name].rho.value == pytest.approx(expected)
        assert -1 < rows[name].rho.low < expected < rows[name].rho.high < 1
    (row,) = correlations([Run(f"r{i}", {"mir": [(0, float(i))]}) for i in range(3)], score | {"r0": -9.0})
    assert (row.rho.low, row.rho.high, row.runs) == (-1, 1, 3)  # three runs tell nothing
    with pytest.raises(ValueError, match="need three runs with a score, got 2 of 9"):
        correlations(runs, {"r0": 1, "r1": 2})
    with pytest.raises(ValueError, match="two runs have one name"):
        correlations([runs[0], runs[0], runs[1]], score)


def test_the_page_opens_offline_and_tells_what_the_runs_logged(tmp_path, capsys):
    folders = [_write_run(tmp_path / f"run{i}", [1.5, 1.5 - i / 10], (0.3 + i / 10, 0.5)) for i in range(4)]
    (tmp_path / "scores.json").write_text(json.dumps({f"run{i}": 10 + i for i in range(4)}))
    arguments = ["report", *map(str, folders), "--score", str(tmp_path / "scores.json")]
    arguments += ["--html", str(tmp_path / "page.html"), "--plot", str(tmp_path / "page.png")]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "run3: mir 1.2" in output
    assert "-1.00" in next(line for line in output.splitlines() if line.startswith("mir "))
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert "http-equiv" not in page
    assert "src=" not in page
    assert "<td>mir</td><td>-1.00</td>" in page
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert cli.main(["report", str(folders[0]), "--score", "nothing"]) == 1
    assert "no run has logged 'nothing'" in capsys.readouterr().err


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOOK = """<script>
const [head, body] = [document.querySelectorAll("th button"), document.querySelector("tbody")]
const first = () => [...body.rows].map(row => row.cells[0].textContent)
const colour = element => getComputedStyle(element).color
const orders = [first()]
for (const column of [0, 0, 2, 2]) { head[column].click(); orders.push(first()) }
document.body.dataset.found = JSON.stringify({
  columns: new Set([...document.querySelectorAll(".panels > div")].map(panel => panel.offsetLeft)).size,
  panels: document.querySelectorAll(".panels svg").length,
  overflow: document.documentElement.scrollWidth - innerWidth,
  text: colour(document.body),
  ground: getComputedStyle(document.body).backgroundColor,
  drawn: getComputedStyle(document.querySelector(".panels svg text, .panels svg g[id^=text] g")).fill,
  sorted: head[2].parentNode.ariaSort,
  orders,
})
</script></body>"""


def _opened(page, folder, width, *options):
    """What a browser makes of the page."""
    (folder / "opened.html").write_text(page.replace("</body>", LOOK))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", *options, (folder / "opened.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(html.unescape(re.search('data-found="(.*?)"', dom)[1]))


def _luminance(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 / 255


@pytest.mark.skipif(CHROMIUM is None, reason="opens the page in Chromium, which is not installed")
@pytest.mark.parametrize(("width", "columns"), [(1300, 3), (800, 2), (500, 1)])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page_wide_narrow_and_dark(tmp_path, width, columns, dark):
    runs = [read_run(_write_run(tmp_path / name, [1.5, 1.25 + place])) for place, name in enumerate("ab")]
    option = "--blink-settings=preferredColorScheme=" + ("0" if dark else "1")
    found = _opened(report_page(runs, [], ""), tmp_path, width, option)
    assert found["panels"] == 4
    assert found["columns"] == columns
    assert found["overflow"] <= 0
    ground, *shown = (_luminance(found[name]) for name in ("ground", "text", "drawn"))
    assert (ground < 0.2) == dark
    assert all(abs(ground - each) > 0.7 for each in shown)


@pytest.mark.skipif(CHROMIUM is None, reason="opens the page in Chromium, which is not installed")
def test_a_click_on_a_column_sorts_by_it_and_another_one_turns_it_round(tmp_path):
    tables = [("T", ["name", "way", "value"], [["b", "up", "9.5"], ["a", "up", "-"], ["c", "down", "10 [8, 12]"]])]
    found = _opened(html_page("x", report_panels([Run("r", {"mir": [(0, 1.0)]})]), tables), tmp_path, 500)
    assert found["orders"] == [[*"bac"], [*"abc"], [*"cba"], [*"bca"], [*"cba"]]  # what is no number stays last
    assert found["sorted"] == "descending"
