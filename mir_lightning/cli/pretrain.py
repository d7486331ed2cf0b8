"""``mir-lightning pretrain``: the recipe, with configs of its own by name."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path


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

    def file_of(config: str) -> str:
        if not Path(config).is_file() and config not in shipped:
            known = ", ".join(sorted(shipped))
            raise ValueError(f"--config {config}: no such file, and none of the shipped: {known}.")
        return config if Path(config).is_file() else str(shipped[config])

    resolved = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, sign, value = argument.partition("=")
        if before == "--config":
            argument = file_of(argument)
        elif option == "--config" and sign:
            argument = f"--config={file_of(value)}"
        resolved.append(argument)
    return resolved
