"""``mir-lightning``: the number from the command line."""

from __future__ import annotations

import argparse
import sys
import traceback

from mir_lightning.cli import compare, evaluate, probe, report


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 fine, 1 failure, 2 bad usage)."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        print(f"mir-lightning: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mir-lightning", description=__doc__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (evaluate, compare, probe, report):
        command.add_parser(commands, [shared])
    return parser


if __name__ == "__main__":
    sys.exit(main())
