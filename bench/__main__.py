"""python -m bench step --dtype bf16: measure, print, and keep a record in bench/results/."""

from __future__ import annotations

import json

import tyro

from bench import aot, kmeans_fit, records, step


def main() -> None:
    suites = {"step": step.StepBenchmark, "aot": aot.AotReport, "kmeans-fit": kmeans_fit.KMeansFitBenchmark}
    options = tyro.extras.subcommand_cli_from_dict(suites, description=__doc__)
    if isinstance(options, aot.AotReport):
        results = aot.run(options)
        if options.record:
            print(f"record: {records.write('aot', 'two_stream_attention', results)}")
        return
    if isinstance(options, kmeans_fit.KMeansFitBenchmark):
        results = kmeans_fit.run(options)
        path = records.write("kmeans_fit", f"{options.data}_cpu", results)
    else:
        results = step.run(options)
        path = records.write("step", f"{options.model}_{options.dtype}_{options.device}", results)
    print(json.dumps(results, indent=1))
    print(f"record: {path}")


if __name__ == "__main__":
    main()
