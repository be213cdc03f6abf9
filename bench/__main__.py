"""Measure, print, and keep a record in bench/results/.

The suites are measured by `run`: python -m bench run --suite step --model tiny --batch 8, or for short
python -m bench step --model tiny. Without any option those run that take minutes. The other commands have options of
their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

try:
    import tyro
except ModuleNotFoundError as error:
    raise SystemExit(
        f"python -m bench needs the package {error.name}: pip install tyro, or without a network bring its wheels "
        "(CONTRIBUTING.md, On a GPU machine)"
    ) from error

from bench import aot, compare, report, report_plots, suites
from bench.options import SUITES, Options


def run_aot(options: aot.AotReport) -> None:
    """Compile, print and record; then exit with status 1 if a 16-bit kernel spills or waits for its tensor cores."""
    if aot.run(options):
        sys.exit(1)


COMMANDS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "run": (Options, suites.run),
    "report": (report.Report, report.run),
    "compare": (compare.Compare, compare.run),
    "plot": (report_plots.Plot, report_plots.run),
    "aot": (aot.AotReport, run_aot),
}
"""Name -> (options, what runs them)."""


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = tyro.extras.subcommand_cli_from_dict(
        {name: kind for name, (kind, _) in COMMANDS.items()},
        description=__doc__,
        config=(tyro.conf.PositionalRequiredArgs,),
        args=with_command(arguments),
    )
    run = next(run for kind, run in COMMANDS.values() if type(options) is kind)
    try:
        run(options)
    except ValueError as error:
        sys.exit(f"python -m bench: error: {error}")


def with_command(arguments: Sequence[str]) -> list[str]:
    """The arguments with `run` in front where they name a suite or nothing; help is that of all commands."""
    if arguments and arguments[0].replace("-", "_") in SUITES:
        return ["run", "--suite", arguments[0].replace("-", "_"), *arguments[1:]]
    if arguments and (arguments[0] in ("-h", "--help") or not arguments[0].startswith("-")):
        return list(arguments)
    return ["run", *arguments]


if __name__ == "__main__":
    main()
