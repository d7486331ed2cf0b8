"""``mir-lightning``: the number from the command line."""

from __future__ import annotations

import argparse
import io
import sys
import traceback
from importlib.metadata import version

from mir_lightning.cli import pretrain


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 fine, 1 failure, 2 bad usage)."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["pretrain"]:  # all that follows is the recipe's own
        return pretrain.run(given[1:])
    options = vars(_parser(given).parse_args(given))
    command = options.pop("run")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that a terminal of few characters cannot show
    try:
        command(**options, typed=frozenset(options)).run()
    except Exception as error:
        if options.get("debug"):
            traceback.print_exc()
        print(f"mir-lightning: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _parser(given: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mir-lightning", description=__doc__)
    parser.add_argument("--version", action="version", version=f"mir-lightning {version('mir-lightning')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    if given[:1] != ["--version"]:
        from mir_lightning.cli import compare, evaluate, probe, report, sds  # seconds: they load PyTorch
        from mir_lightning.cli.options import add_arguments

        for command in (evaluate.Eval, compare.Compare, sds.SDS, probe.Probe, report.Report):
            name, text = command.__name__.lower(), command.__doc__
            one = commands.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
            add_arguments(one, command)
            one.set_defaults(run=command)
    recipe = 'pre-train a model with the recipe: "pretrain fit --config demo", "pretrain fit --help"'
    commands.add_parser("pretrain", add_help=False, help=recipe)
    return parser
