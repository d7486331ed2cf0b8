"""What goes for all commands: outputs that are looked at first, help, terminals of few characters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mir_lightning import cli

PROBE = "processor images texts data image-folder num seed batch-size prompt text max-unreadable debug "
EVALUATION = (
    "device device-map dtype probe variant layers image-token-id no-check no-progress json csv plot "
    "interval rank-order " + PROBE
)
FLAGS = {
    "eval": "worst gain " + EVALUATION,
    "compare": "allow-different " + EVALUATION,
    "probe": "output " + PROBE,
    "report": "score validate given json html plot debug",
}


@pytest.mark.parametrize("command", FLAGS)
def test_help_names_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{flag}" in shown for flag in FLAGS[command].split())


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("--json", "nowhere/out.json"),
        ("--csv", "."),
        ("--json", "/dev/null"),
        ("--plot", "curve.xyz"),
        ("--plot", "nowhere/curve.png"),
    ],
)
def test_outputs_are_refused_before_the_work(run, shared, tmp_path, option, place, capsys):
    with pytest.raises(SystemExit) as stop:
        run("eval", tmp_path / "no model", option, tmp_path / place)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"argument {option}: must" in message
    assert str(tmp_path / place) in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "m", "--json", "a", "--csv", "./a"], "csv: a is a file of json as well"),
        (["eval", "m", "--probe", "a", "--json", "a"], "json: a is a file of probe as well"),
        (["compare", "a.json", "b.json", "--json", "b.json"], "json: b.json is a file of sources as well"),
        (["probe", "m", "--data", "a.json", "-o", "a.json"], "output: a.json is a file of data as well"),
        (["report", "a.csv", "--html", "a.csv"], "html: a.csv is a file of runs as well"),
        (["report", "a.csv", "--given", "mir", "--json", "a.json"], "--given, --json goes with --validate, which"),
        (["report", "--validate", "a.csv", "b.csv"], "--validate reads one table of all runs, got 2 files"),
        (
            ["eval", "m", "--prompt", "{image}{image} {text}"],
            "prompt (--prompt) must hold {image} once, and {text}, got",
        ),
        (["eval", "m", "--prompt", "{image}"], "prompt (--prompt) must hold {image} once, and {text}, got"),
        (["eval", "m", "--prompt", "{image}\udcff{text}"], "prompt (--prompt) holds half of a character"),
        (["eval", "m", "--device", "cpu", "--device-map", "auto"], "--device cpu and --device-map auto exclude"),
        (
            ["eval", "m", "--variant", "official", "--interval"],
            "--variant official has no interval, as it replaces",
        ),
        (["eval", "m", "--variant", "official-fast", "--worst", "1"], "--variant official-fast has no interval"),
        (["eval", "m", "--worst", "1", "--probe", "a"], "--worst shows pictures and texts: give --images and"),
        (["eval", "m", "--worst", "8", "--num", "7"], "--worst 8: the probe has 7 pairs (--num)."),
        (["eval", "m", "--worst", "1", "--plot", "folder/b.png"], "worst_plot: must be a regular file"),
        (
            ["eval", "m", "--worst", "1", "--plot", "c.png", "--json", "c_worst.png"],
            "worst_plot: c_worst.png is a",
        ),
        (["eval", "m", "--data", "a", "--images", "b", "--texts", "c"], "--images, --texts: --images goes with"),
        (["eval", "m", "--images", "b", "--texts", "c", "--image-folder", "d"], "--image-folder: --images goes"),
    ],
)
def test_what_excludes_each_other_is_refused_before_the_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder/b_worst.png").mkdir(parents=True)
    assert cli.main(arguments) == 1
    assert f"mir-lightning: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
@pytest.mark.parametrize(
    ("option", "command"),
    [
        ("texts", ["eval", "m", "--texts", "d"]),
        ("images", ["eval", "m", "--images", "d"]),
        ("image_folder", ["eval", "m", "--data", "a", "--image-folder", "."]),
        ("model", ["eval", "d"]),
        ("sources", ["compare", "d"]),
        ("processor", ["eval", "m", "--processor", "d"]),
        ("runs", ["report", "."]),
        ("data", ["eval", "m", "--data", "d/a.csv"]),
    ],
)
def test_a_file_in_a_folder_that_is_read_is_not_overwritten(tmp_path, monkeypatch, capsys, option, command, link):
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    Path("d/a.csv").write_text("step,mir\n0,1\n")
    if link:
        link(Path("d/a.csv").absolute(), "b.csv")
    place = "b.csv" if link else "d/a.csv"
    written = "html" if option == "runs" else "csv"
    assert cli.main([*command, f"--{written}", place]) == 1
    assert f"{written}: {place} is a file of {option} as well; it would be over" in capsys.readouterr().err
    assert Path("d/a.csv").read_text() == "step,mir\n0,1\n"


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta", ""])
def test_a_device_is_one_to_compute_on(device, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "m", "--device", device])
    assert stop.value.code == 2
    message = (
        "argument --device: must be auto, cpu, or another device that torch finds here, such as cuda or cuda:1"
    )
    assert f"{message}, got '{device}'" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["-1", "nan", "1", "some"])
def test_a_share_lies_in_0_to_1(run, tmp_path, share, capsys):
    with pytest.raises(SystemExit) as stop:
        run("eval", tmp_path / "no model", "--max-unreadable", share)
    assert stop.value.code == 2
    assert f"argument --max-unreadable: must be a share in [0, 1), got '{share}'" in capsys.readouterr().err


def test_files_are_written_before_anything_is_printed(run, shared, tmp_path, monkeypatch):
    with Path(os.devnull).open() as not_writable:
        monkeypatch.setattr(sys, "stdout", not_writable)
        files = [tmp_path / name for name in ("out.json", "out.csv", "out.png")]
        assert (
            run("eval", shared.root / "model", "--json", files[0], "--csv", files[1], "--plot", files[2]).status
            == 1
        )
    assert all(file.stat().st_size > 100 for file in files)


def test_a_terminal_of_few_characters(shared, tmp_path):
    (tmp_path / "modèle").symlink_to(shared.root / "model")
    arguments = [
        "compare",
        tmp_path / "modèle",
        "--images",
        shared.root / "images",
        "--texts",
        shared.root / "texts",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mir_lightning", *map(str, [*arguments, "--num", 3, "--no-progress"])],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        cwd=Path(cli.__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    line = done.stdout.decode("ascii").splitlines()[1]
    assert line.startswith(r"mod\xe8le ")
    assert set(line.split()[-1]) <= set("12345678")
    assert "8" in line.split()[-1]
