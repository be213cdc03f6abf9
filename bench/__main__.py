"""python -m bench step --dtype bf16: measure, print, and keep a record in bench/results/."""

from __future__ import annotations

import json

import tyro

from bench import records, step


def main() -> None:
    options = tyro.extras.subcommand_cli_from_dict({"step": step.StepBenchmark}, description=__doc__)
    results = step.run(options)
    path = records.write("step", f"{options.model}_{options.dtype}_{options.device}", results)
    print(json.dumps(results, indent=1))
    print(f"record: {path}")


if __name__ == "__main__":
    main()
