"""The Triton kernels of two-stream attention at many random shapes, in Triton's interpreter, against float64.

It runs tests/triton_cases.py::test_random_shapes with more examples than `make test` does and records the outcome: the
count, how long it took, and on failure what the test printed, the smallest failing shape last.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TEST = "tests/triton_cases.py::test_random_shapes"


@dataclass(frozen=True)
class RandomShapes:
    """How many shapes to try. 10,000 take about 80 minutes on one core."""

    count: int = 10_000


def run(options: RandomShapes) -> dict[str, Any]:
    """Run the test; its results as a record keeps them."""
    if options.count < 1:
        raise SystemExit(f"--count must be at least 1, got {options.count}")
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_RANDOM_SHAPES": str(options.count)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-show-statistics", TEST]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    print(done.stdout, done.stderr, sep="\n")
    return {"test": TEST, "passed": done.returncode == 0} | {
        "examples_asked_for": options.count,
        "examples_passed": passing_examples(done.stdout),
        "seconds": round(time.monotonic() - start),
        "output": "" if done.returncode == 0 else done.stdout[-4000:],
    }


def passing_examples(output: str) -> int:
    """Examples that passed, from hypothesis' statistics: those of its generate and reuse phases together."""
    return sum(map(int, re.findall(r"(\d+) passing\b", output)))
