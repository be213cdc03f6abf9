"""Every Triton kernel compiled for GPUs that are not here: tensor cores used, nothing spilled, shared memory fits.

Compiled in a process of its own, without TRITON_INTERPRET. `python -m bench aot` compiles the whole matrix.
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

# Sizes, dtypes and variants that between them meet every branch of the kernels and every entry of the launch table.
MATRIX = (
    ((64,), ("fp16",), ("plain", "gather", "last_block", "pim", "single_per_image")),
    ((64,), ("bf16",), ("plain", "single")),
    ((16, 32, 64, 128), ("fp32",), ("plain",)),
    ((16,), ("tf32",), ("single",)),
    ((16, 32, 128), ("fp16",), ("plain",)),
)

COMPILE = """
import dataclasses, json, sys
from bench import aot
options = json.loads(sys.argv[1])
print(json.dumps([dataclasses.asdict(row) for row in aot.compile_all(aot.AotReport(**options))]))
"""


@pytest.mark.parametrize(("sizes", "dtypes", "variants"), MATRIX)
def test_kernels_compile_without_spills(
    sizes: tuple[int, ...], dtypes: tuple[str, ...], variants: tuple[str, ...]
) -> None:
    pytest.importorskip("triton")
    options = {"sizes": sizes, "dtypes": dtypes, "variants": variants}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = json.loads(result.stdout)
    kernels = sum(4 if variant.startswith("single") else 3 for variant in variants)
    assert len(rows) == kernels * 2 * len(sizes) * len(dtypes)
    for row in rows:
        assert row["spill_stores"] == row["spill_loads"] == 0, row
        assert row["shared"] <= launch.TARGETS[row["architecture"]].shared_memory, row
        # fp32 products are IEEE unless TF32 is asked for: no tensor cores. The lists of tiles have no products.
        assert (row["mma"] > 0) == (row["dtype"] != "fp32" and row["kernel"] != "row_tile_list_kernel"), row


def test_launch_table_is_a_pure_function() -> None:
    assert [launch.padded_size(size) for size in (1, 16, 17, 80, 128)] == [16, 16, 32, 128, 128]
    targets = [launch.target_of(capability, 99 * 1024) for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))]
    assert [target.has_wgmma for target in targets] == [False, False, True, True, False]
    with pytest.raises(ValueError, match=r"capability 8.0 or newer, this device has 7.5"):
        launch.target_of((7, 5), 64 * 1024)
