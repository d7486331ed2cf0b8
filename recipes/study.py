"""Does a reading of pre-training rank runs as their fine-tuned score does? The same fine-tuning for every run.

    python -m recipes.study recipes/configs/study/study.yaml runs/study [--workers 2] [--only NAME ...]

pre-trains each configuration with each seed by the recipe, fine-tunes it, and adds its readings at every point and
its score to ``FOLDER/study.csv``. Runs that are in there are not done again, and an interrupted one goes on where
it was: start the same command again. Then: ``mir-lightning report --validate FOLDER/study.csv``.
"""

import argparse
import csv
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import yaml

Options = Mapping[str, Any]


@dataclass(frozen=True)
class StudyPlan:
    """A study's file.

    Args:
        pretrain: config of the recipe for the first stage, relative to the study's file.
        finetune: config for the second one, which starts from the first one's ``model/``.
        seeds: by seed, what it changes in the first stage.
        factors: by factor, configurations by name: what each changes in the first stage. ``base`` is the name of
            the one that belongs to every factor.
        score: name of what the second stage logs that counts, such as ``answers/em_0``; its parts by task and
            ability go into the table, too.
    """

    pretrain: Path
    finetune: Path
    seeds: Mapping[int, Options]
    factors: Mapping[str, Mapping[str, Options]]
    score: str

    @classmethod
    def read(cls, file: Path) -> "StudyPlan":
        """Of a YAML file.

        Raises:
            ValueError: naming what is missing, not known, or named twice.
        """
        found = yaml.safe_load(file.read_text())
        wanted = {"pretrain": str, "finetune": str, "seeds": dict, "factors": dict, "score": str}
        if not isinstance(found, dict) or found.keys() != wanted.keys():
            given = sorted(found) if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"{file} must hold {', '.join(wanted)}, it holds {given}.")
        for key, kind in wanted.items():
            if not isinstance(found[key], kind) or not found[key]:
                raise ValueError(f"{file}: {key} must be a {kind.__name__} that is not empty, got {found[key]!r}.")
        names = [name for configurations in found["factors"].values() for name in configurations]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{file}: factors name {', '.join(twice)} twice.")
        for key in ("pretrain", "finetune"):
            if not (place := file.parent / found[key]).is_file():
                raise ValueError(f"{file}: {key} must be a config of the recipe, there is no {place}.")
            found[key] = place
        return cls(**found)

    def runs(self, only: Sequence[str] = ()) -> "Iterator[StudyRun]":
        """All of them, a seed of every configuration before the next seed."""
        for seed, of_seed in self.seeds.items():
            for factor, configurations in self.factors.items():
                for name, changes in configurations.items():
                    if not only or name in only:
                        yield StudyRun(self, factor, name, seed, (changes, of_seed))


@dataclass(frozen=True)
class StudyRun:
    """A configuration with a seed: what it is, and what it changes in the first stage."""

    study: StudyPlan
    factor: str
    configuration: str
    seed: int
    changes: tuple[Options, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.configuration}-{self.seed}"


class Stopped(Exception):
    """A run was told to stop, and the study is to stop with it."""


Row = dict[str, Any]
_NOT_ASKED = re.compile(
    r"train|lr-|epoch|throughput|device|sds_chance|mir_official_|image_gain_probe/|"
    r".*(_se|seconds|overhead|/layer_\d+|_sources/.*|alarms/.*)$"
)


def train_and_read(run: StudyRun, root: Path, threads: int) -> list[Row]:
    """Both stages; rows of what they logged, a row for each point. Their models are removed."""
    import torch

    from mir_lightning.report import read_run

    torch.set_num_threads(threads)
    folder = root / run.name
    model = folder / "pretrain" / "model"
    if not model.is_dir():
        _fit(run.study.pretrain, folder / "pretrain", run.changes)
    _fit(run.study.finetune, folder / "finetune", [{"model": {"vlm": str(model)}}])
    before, after = (read_run(folder / stage).curves for stage in ("pretrain", "finetune"))
    rows = _rows(before, _scores(after, run.study.score))
    who = {"run": run.name, "configuration": run.configuration, "factor": run.factor, "seed": run.seed}
    for stage in ("pretrain", "finetune"):
        for part in ("model", "checkpoints"):
            shutil.rmtree(folder / stage / part, ignore_errors=True)
    return [{**who, **row} for row in rows]


def _fit(config: Path, folder: Path, changes: Iterable[Options]) -> None:
    from recipes.llava_pretrain import main as recipe

    folder.mkdir(parents=True, exist_ok=True)
    files = [config]
    for number, change in enumerate([*changes, {"trainer": {"default_root_dir": str(folder)}}]):
        files.append(folder / f"changes-{number}.yaml")
        files[-1].write_text(yaml.safe_dump(dict(change)))
    recipe(["fit", *(part for file in files for part in ("--config", str(file)))])
    parent = parent_process()
    if not (folder / "model").is_dir() or (parent is not None and not parent.is_alive()):
        raise Stopped(f"{folder} was stopped; the same command goes on")


def _scores(curves: Mapping[str, Sequence[tuple[int, float]]], score: str) -> dict[str, float]:
    """The last values: ``score``, and ``score/<task or ability>``."""
    name, _, kind = score.partition("/")
    found = {"score": curves[score][-1][1]}
    for group in ("tasks", "abilities"):
        start = f"{name}_{group}/{kind}/"
        found |= {f"score/{key[len(start) :]}": curves[key][-1][1] for key in curves if key.startswith(start)}
    return found


def _rows(curves: Mapping[str, Sequence[tuple[int, float]]], scores: Mapping[str, float]) -> list[Row]:
    """A row for each step at which something was asked of the model, the scores in the last."""
    steps: dict[int, dict[str, Any]] = defaultdict(dict)
    for name, curve in curves.items():
        for step, value in () if _NOT_ASKED.match(name) else curve:
            steps[step][name] = value
    rows = [{"step": step, **steps[step]} for step in sorted(steps)]
    rows[-1] |= scores
    return rows


def read_table(file: Path) -> list[Row]:
    """Rows of the runs that are done."""
    from mir_lightning.files import read_csv

    return read_csv(file) if file.exists() else []


def write_table(file: Path, rows: Sequence[Row]) -> None:
    """All at once, six digits a number."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    beside = file.with_name(f".{file.name}.part")
    with beside.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{cell:.6g}" if isinstance(cell, float) else cell for name, cell in row.items()}
            )
    beside.replace(file)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("root", type=Path, metavar="FOLDER")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="configurations")
    options = parser.parse_args()
    runs = list(StudyPlan.read(options.study).runs(options.only))
    if not runs:
        parser.error(f"--only: no configuration is named {' or '.join(options.only)}")
    options.root.mkdir(parents=True, exist_ok=True)
    table = options.root / "study.csv"
    rows = read_table(table)
    done = {row["run"] for row in rows}
    missing = [run for run in runs if run.name not in done]
    order = {run.name: number for number, run in enumerate(runs)}
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    print(f"{len(runs)} runs, {len(runs) - len(missing)} done", flush=True)
    start, failed = time.perf_counter(), list[str]()
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        started = {pool.submit(train_and_read, run, options.root, threads): run for run in missing}
        for number, future in enumerate(as_completed(started), start=1):
            try:
                rows += future.result()
            except Stopped as stop:
                pool.shutdown(wait=False, cancel_futures=True)
                raise SystemExit(str(stop)) from stop
            except Exception as error:
                failed.append(started[future].name)
                print(f"{failed[-1]} failed: {type(error).__name__}: {error}", flush=True)
                continue
            write_table(table, sorted(rows, key=lambda row: order.get(row["run"], -1)))
            passed = (time.perf_counter() - start) / 60
            left = passed / number * (len(missing) - number)
            print(
                f"{started[future].name} done, {number} of {len(missing)}: {passed:.0f} min, {left:.0f} left",
                flush=True,
            )
    if failed:
        raise SystemExit(f"failed, the same command tries again: {', '.join(failed)}")
    print(f"mir-lightning report --validate {table}")


if __name__ == "__main__":
    main()
