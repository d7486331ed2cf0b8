"""``mir-lightning pretrain``: the recipe, with configs of its own by name."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """The ``pretrain`` command, as the list of commands shows it."""
    commands.add_parser(
        "pretrain",
        add_help=False,
        help='pre-train a model with the recipe: "pretrain fit --config demo", "pretrain fit --help"',
    )


def run(arguments: list[str]) -> int:
    """Run the recipe's script with these arguments; ``--config`` takes a shipped config's name, or a file."""
    if find_spec("jsonargparse") is None:
        print("mir-lightning: pretrain needs pip install 'mir-lightning[recipes]'", file=sys.stderr)
        return 1
    folder = recipe_folder()
    try:
        sys.argv = [str(folder / "llava_pretrain.py"), *_with_files(arguments, folder / "configs")]
    except ValueError as error:
        print(f"mir-lightning: {error}", file=sys.stderr)
        return 2
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


def recipe_folder() -> Path:
    """Where the recipe and its configs lie: in the installed package, or beside it in the repository."""
    package = Path(__file__).parents[1]
    return next(f for f in (package / "recipes", package.parent / "recipes") if f.is_dir())


def _with_files(arguments: list[str], configs: Path) -> list[str]:
    """The arguments, with the files of shipped configs in the place of their names."""
    shipped = {file.relative_to(configs).with_suffix("").as_posix(): file for file in configs.glob("**/*.yaml")}
    resolved = []
    for place, argument in enumerate(arguments):
        option, sign, value = argument.partition("=")
        if option == "--config" and sign:
            resolved.append(f"--config={_file(value, shipped)}")
        elif place and arguments[place - 1] == "--config":
            resolved.append(str(_file(argument, shipped)))
        else:
            resolved.append(argument)
    return resolved


def _file(config: str, shipped: dict[str, Path]) -> Path:
    if Path(config).is_file():
        return Path(config)
    if config in shipped:
        return shipped[config]
    raise ValueError(f"--config {config}: no such file, and none of the shipped: {', '.join(sorted(shipped))}.")
