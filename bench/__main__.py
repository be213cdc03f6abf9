"""python -m bench step --dtype bf16: measure, print, and keep a record in bench/results/."""

from __future__ import annotations

import json

import tyro

from bench import aot, aot_kmeans, kmeans, records, step


def main() -> None:
    suites = {
        "step": step.StepBenchmark,
        "aot": aot.AotReport,
        "kmeans": kmeans.KMeansBenchmark,
        "aot-kmeans": aot_kmeans.KMeansAotReport,
    }
    options = tyro.extras.subcommand_cli_from_dict(suites, description=__doc__)
    if isinstance(options, kmeans.KMeansBenchmark | aot_kmeans.KMeansAotReport):
        options.run()
        return
    if isinstance(options, aot.AotReport):
        results = aot.run(options)
        if options.record:
            print(f"record: {records.write('aot', 'two_stream_attention', results)}")
        return
    results = step.run(options)
    path = records.write("step", f"{options.model}_{options.dtype}_{options.device}", results)
    print(json.dumps(results, indent=1))
    print(f"record: {path}")


if __name__ == "__main__":
    main()
