"""python -m bench attention: measure, print, and keep a record in bench/results/."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

try:
    import tyro
except ModuleNotFoundError as error:
    raise SystemExit(
        f"python -m bench needs the package {error.name}: pip install tyro, or without a network bring its wheels "
        "(CONTRIBUTING.md, On a GPU machine)"
    ) from error

from bench import (
    aot,
    aot_kmeans,
    attention,
    compare,
    curves,
    kmeans,
    kmeans_fit,
    plot,
    random_shapes,
    records,
    step,
    tokenize_suite,
    tune,
)


def run_step(options: step.StepBenchmark) -> None:
    """Measure, print and record the training step."""
    results = step.run(options)
    path = records.write("step", f"{options.model}_{options.dtype}_{options.device}", results, options.output)
    print(f"{json.dumps(results, indent=1)}\nrecord: {path}")


def run_aot(options: aot.AotReport) -> None:
    """Compile the attention kernels, print a line each, and record them if wanted."""
    results = aot.run(options)
    if options.record:
        print(f"record: {records.write('aot', 'attention', results)}")


def run_random_shapes(options: random_shapes.RandomShapes) -> None:
    """Run the random shapes and record the outcome."""
    results = random_shapes.run(options)
    print(f"record: {records.write('random_shapes', f'two_stream_attention_{options.count}', results)}")


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


SUITES: dict[str, tuple[type, Callable[[Any], object]]] = {
    "attention": (attention.AttentionBenchmark, attention.run),
    "step": (step.StepBenchmark, run_step),
    "kmeans": (kmeans.KMeansBenchmark, kmeans.KMeansBenchmark.run),
    "kmeans-fit": (kmeans_fit.KMeansFitBenchmark, run_kmeans_fit),
    "tokenize": (tokenize_suite.TokenizeBenchmark, run_tokenize),
    "plot": (plot.Plot, plot.run),
    "compare": (compare.Compare, compare.run),
    "curves": (curves.CurvesBenchmark, curves.CurvesBenchmark.run),
    "tune": (tune.Tune, tune.run),
    "aot": (aot.AotReport, run_aot),
    "aot-kmeans": (aot_kmeans.KMeansAotReport, aot_kmeans.KMeansAotReport.run),
    "random-shapes": (random_shapes.RandomShapes, run_random_shapes),
}
"""Name -> (options, what runs them)."""


def main() -> None:
    options = tyro.extras.subcommand_cli_from_dict(
        {name: kind for name, (kind, _) in SUITES.items()},
        description=__doc__,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    run = next(run for kind, run in SUITES.values() if type(options) is kind)
    try:
        run(options)
    except ValueError as error:
        sys.exit(f"python -m bench: error: {error}")


if __name__ == "__main__":
    main()
