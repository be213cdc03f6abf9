"""python -m bench step --dtype bf16: measure, print, and keep a record in bench/results/."""

from __future__ import annotations

import json

import tyro

from bench import aot, random_shapes, records, step


def main() -> None:
    suites = {"step": step.StepBenchmark, "aot": aot.AotReport, "random-shapes": random_shapes.RandomShapes}
    options = tyro.extras.subcommand_cli_from_dict(suites, description=__doc__)
    if isinstance(options, aot.AotReport):
        results = aot.run(options)
        if options.record:
            print(f"record: {records.write('aot', 'attention', results)}")
        return
    if isinstance(options, random_shapes.RandomShapes):
        results = random_shapes.run(options)
        print(f"record: {records.write('random_shapes', f'two_stream_attention_{options.count}', results)}")
        return
    results = step.run(options)
    path = records.write("step", f"{options.model}_{options.dtype}_{options.device}", results)
    print(json.dumps(results, indent=1))
    print(f"record: {path}")


if __name__ == "__main__":
    main()
