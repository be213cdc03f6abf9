"""The k-means kernels compiled for GPUs that are not here: tensor cores used, nothing spilled, shared memory fits.

Compiled in a process of its own, without TRITON_INTERPRET. `python -m bench aot --matrix` compiles more sizes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mapet_kernels import launch

ROOT = Path(__file__).parent.parent

# The size of k-CLIP, and one product a tile. bfloat16 and float32 rows are copied to float16 in the exact
# mode; in the fast one bfloat16 multiplies as it is.
MATRIX = (((4096,), ("fp16", "bf16")), ((64,), ("fp32",)))

COMPILE = """
import dataclasses, json, sys
from bench import aot
options = aot.AotReport(**json.loads(sys.argv[1]))
print(json.dumps([dataclasses.asdict(row) for row in aot.compile_all(options)]))
"""


@pytest.mark.parametrize(("features", "dtypes"), MATRIX)
def test_kernels_compile_without_spills(features: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    pytest.importorskip("triton")
    options = {"sizes": (), "features": features, "dtypes": dtypes}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = json.loads(result.stdout)
    scores = [row for row in rows if row["kernel"] == "scores_kernel"]
    assert len(scores) == 2 * 2 * len(dtypes)
    assert {row["kernel"] for row in rows} == {
        "centroids_kernel", "rows_kernel", "scores_kernel", "merge_kernel", "decide_kernel", "distances_kernel",
        "partial_sums_kernel", "sums_kernel",
    }  # fmt: skip
    for row in rows:
        assert row["spill_stores"] == row["spill_loads"] == 0, row
        assert row["shared"] <= launch.TARGETS[row["architecture"]].shared_memory, row
        assert (row["mma"] > 0) == (row["kernel"] == "scores_kernel"), row
    for row in scores:
        if row["size"] > 64:
            assert row["asynchronous_copies"] > 0, row  # operands are on their way while others are multiplied
