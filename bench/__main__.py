"""python -m bench step --dtype bf16: measure, print, and keep a record in bench/results/."""

from __future__ import annotations

import json

import tyro

from bench import aot, records, step, tokenize_suite


def main() -> None:
    suites = {"step": step.StepBenchmark, "aot": aot.AotReport, "tokenize": tokenize_suite.TokenizeBenchmark}
    options = tyro.extras.subcommand_cli_from_dict(suites, description=__doc__)
    if isinstance(options, aot.AotReport):
        results = aot.run(options)
        if options.record:
            print(f"record: {records.write('aot', 'two_stream_attention', results)}")
        return
    if isinstance(options, tokenize_suite.TokenizeBenchmark):
        results = tokenize_suite.run(options)
        label = f"kclip_{results['precision']}_{options.device}"
        print(json.dumps(results, indent=1))
        print(f"record: {records.write('tokenize', label, results)}")
        return
    results = step.run(options)
    path = records.write("step", f"{options.model}_{options.dtype}_{options.device}", results)
    print(json.dumps(results, indent=1))
    print(f"record: {path}")


if __name__ == "__main__":
    main()
