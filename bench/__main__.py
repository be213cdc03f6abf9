"""Measure, print, and keep a record in bench/results/.

The suites are measured by `run`, which may be left out: python -m bench --suite step --model tiny --batch 8. Without
any option all six run, small ones on a CPU. The other commands have options of their own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

try:
    import tyro
except ModuleNotFoundError as error:
    raise SystemExit(
        f"python -m bench needs the package {error.name}: pip install tyro, or without a network bring its wheels "
        "(CONTRIBUTING.md, On a GPU machine)"
    ) from error

from bench import (
    ablation,
    aot,
    attention,
    compare,
    curves,
    kmeans,
    kmeans_fit,
    plot,
    records,
    report,
    suites,
    tokenize_suite,
)
from bench.options import Options


@dataclass(frozen=True)
class StepOptions(Options):
    """The same for the suite step alone."""

    suite: tyro.conf.Suppress[tuple[str, ...]] = ("step",)


def run_aot(options: aot.AotReport) -> None:
    """Compile, print and record; then exit with status 1 if a 16-bit kernel spills or waits for its tensor cores."""
    if aot.run(options):
        sys.exit(1)


def run_kmeans_fit(options: kmeans_fit.KMeansFitBenchmark) -> None:
    """Compare fits, print and record them."""
    results = kmeans_fit.run(options)
    path = records.write("kmeans_fit", f"{options.data}_cpu", results)
    print(f"{json.dumps(results, indent=1)}\nrecord: {path}")


def run_tokenize(options: tokenize_suite.TokenizeBenchmark) -> None:
    """Measure, print and record the tokenizing of images."""
    results = tokenize_suite.run(options)
    path = records.write("tokenize", f"kclip_{results['precision']}_{options.device}", results, options.output)
    print(f"{json.dumps(results, indent=1)}\nrecord: {path}")


COMMANDS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "run": (Options, suites.run),
    "step": (StepOptions, suites.run),
    "ablation": (ablation.Ablation, ablation.run),
    "report": (report.Report, report.run),
    "attention": (attention.AttentionBenchmark, attention.run),
    "kmeans": (kmeans.KMeansBenchmark, kmeans.KMeansBenchmark.run),
    "kmeans-fit": (kmeans_fit.KMeansFitBenchmark, run_kmeans_fit),
    "tokenize": (tokenize_suite.TokenizeBenchmark, run_tokenize),
    "plot": (plot.Plot, plot.run),
    "compare": (compare.Compare, compare.run),
    "curves": (curves.CurvesBenchmark, curves.CurvesBenchmark.run),
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
    """The arguments with `run` in front where they name no command; help is that of all commands."""
    if arguments and (arguments[0] in ("-h", "--help") or not arguments[0].startswith("-")):
        return list(arguments)
    return ["run", *arguments]


if __name__ == "__main__":
    main()
