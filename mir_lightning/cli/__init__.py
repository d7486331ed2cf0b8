"""``mir-lightning``: the number from the command line."""

from __future__ import annotations

import argparse
import sys
import traceback
from importlib.metadata import version

from mir_lightning.cli import pretrain


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 fine, 1 failure, 2 bad usage)."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["pretrain"]:  # all that follows is the recipe's own
        return pretrain.run(given[1:])
    options = _parser(given).parse_args(given)
    try:
        options.run(options)
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        print(f"mir-lightning: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _parser(given: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mir-lightning", description=__doc__)
    parser.add_argument("--version", action="version", version=f"mir-lightning {version('mir-lightning')}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    commands = parser.add_subparsers(dest="command", required=True)
    if given[:1] != ["--version"]:
        from mir_lightning.cli import compare, evaluate, probe, report  # seconds: they load PyTorch

        for command in (evaluate, compare, probe, report):
            command.add_parser(commands, [shared])
    pretrain.add_parser(commands)
    return parser
