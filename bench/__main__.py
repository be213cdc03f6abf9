"""python -m bench attention: measure, print, and keep a record in bench/results/."""

from __future__ import annotations

import json
import sys

try:
    import tyro
except ModuleNotFoundError as error:
    raise SystemExit(
        f"python -m bench needs the package {error.name}: pip install tyro, or without a network bring its wheels "
        "(CONTRIBUTING.md, On a GPU machine)"
    ) from error

from bench import aot, attention, plot, random_shapes, records, step, tune

SUITES = {
    "attention": attention.AttentionBenchmark,
    "step": step.StepBenchmark,
    "aot": aot.AotReport,
    "plot": plot.Plot,
    "tune": tune.Tune,
    "random-shapes": random_shapes.RandomShapes,
}


def main() -> None:
    options = tyro.extras.subcommand_cli_from_dict(
        SUITES, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,)
    )
    try:
        run(options)
    except ValueError as error:
        sys.exit(f"python -m bench: error: {error}")


def run(options: object) -> None:
    """Run the suite that these are the options of."""
    if isinstance(options, attention.AttentionBenchmark):
        attention.run(options)
    elif isinstance(options, tune.Tune):
        tune.run(options)
    elif isinstance(options, plot.Plot):
        plot.run(options)
    elif isinstance(options, aot.AotReport):
        results = aot.run(options)
        if options.record:
            print(f"record: {records.write('aot', 'two_stream_attention', results)}")
    elif isinstance(options, random_shapes.RandomShapes):
        results = random_shapes.run(options)
        print(f"record: {records.write('random_shapes', f'two_stream_attention_{options.count}', results)}")
    else:
        results = step.run(options)
        path = records.write("step", f"{options.model}_{options.dtype}_{options.device}", results, options.output)
        print(json.dumps(results, indent=1))
        print(f"record: {path}")


if __name__ == "__main__":
    main()
