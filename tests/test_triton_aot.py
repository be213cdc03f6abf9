"""Every Triton kernel compiled for GPUs that are not here: tensor cores used, nothing spilled, shared memory fits.

Compiled in a process of its own, without TRITON_INTERPRET; what is expected of Hopper also with Triton 3.6, which
`make test` puts beside the installed one. `python -m bench aot --matrix` compiles all combinations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mapet_kernels import launch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
OLDER = Path(sys.prefix, "triton36")

# Sizes, dtypes and variants that between them meet every branch of the kernels and most entries of the launch table.
MATRIX = (
    ((64,), ("fp16",), ("plain", "gather", "single_per_image")),
    ((64,), ("bf16",), ("single",)),
    ((64, 128), ("fp32",), ("plain",)),
    ((16,), ("tf32",), ("single",)),
    ((16, 128), ("fp16",), ("plain",)),
)

# The size of k-CLIP, and one product a tile. bfloat16 and float32 rows are copied to float16 in the exact mode; in the
# fast one bfloat16 multiplies as it is.
KMEANS = (((4096,), ("fp16", "bf16")), ((64,), ("fp32",)))

COMPILE = """
import dataclasses, json, sys
from bench import aot
rows = [row for options in json.loads(sys.argv[1]) for row in aot.compile_all(aot.AotReport(**options))]
print(json.dumps([dataclasses.asdict(row) for row in rows]))
"""
COSTS = """
import dataclasses, json, sys
from bench import aot
costs = [cost for name in json.loads(sys.argv[1]) for cost in aot.costs_of(name, products=True)]
print(json.dumps([dataclasses.asdict(cost) | {"problems": cost.compiled.problems()} for cost in costs]))
"""


def in_process(script: str, argument: Any, folder: Path | None = None) -> Any:
    """What the script prints as JSON; with the Triton in `folder`, if one is given."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, sys.path)])
    command = [sys.executable, "-c", script, json.dumps(argument)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def test_attention_kernels_compile_without_spills() -> None:
    pytest.importorskip("triton")
    options = [{"sizes": sizes, "dtypes": dtypes, "variants": variants} for sizes, dtypes, variants in MATRIX]
    rows = in_process(COMPILE, [x | {"features": ()} for x in options])
    kernels = {variant: 4 if variant.startswith("single") else 3 for _, _, names in MATRIX for variant in names}
    assert len(rows) == 2 * sum(
        kernels[name] * len(sizes) * len(dtypes) for sizes, dtypes, names in MATRIX for name in names
    )
    for row in rows:
        assert_fits(row)
        # fp32 products are IEEE unless TF32 is asked for: no tensor cores. The lists of tiles have no products.
        assert (row["mma"] > 0) == (row["dtype"] != "fp32" and row["kernel"] != "row_tile_list_kernel"), row


def test_kmeans_kernels_compile_without_spills() -> None:
    pytest.importorskip("triton")
    rows = in_process(COMPILE, [{"sizes": (), "features": sizes, "dtypes": dtypes} for sizes, dtypes in KMEANS])
    scores = [row for row in rows if row["kernel"] == "scores_kernel"]
    assert len(scores) == 2 * 2 * sum(len(dtypes) for _, dtypes in KMEANS)
    assert {row["kernel"] for row in rows} == {
        "centroids_kernel", "rows_kernel", "scores_kernel", "merge_kernel", "decide_kernel", "distances_kernel",
        "partial_sums_kernel", "sums_kernel",
    }  # fmt: skip
    for row in rows:
        assert_fits(row)
        assert (row["mma"] > 0) == (row["kernel"] == "scores_kernel"), row
    for row in scores:
        assert row["asynchronous_copies"] > 0, row  # operands are on their way while others are multiplied


def assert_fits(row: dict[str, Any]) -> None:
    """No spills, and no more shared memory than there is."""
    assert row["spill_stores"] == row["spill_loads"] == 0, row
    assert row["shared"] <= launch.TARGETS[row["architecture"]].shared_memory, row


SMALL = """
import json, triton
from triton.backends.compiler import GPUTarget
from bench import aot, aot_compile
from mapet_kernels.launch import TARGETS, Target
found = {}
for target in (TARGETS[86], TARGETS[120], Target(90, 99 * 1024)):
    for part in aot.launches(128, "fp16", "gather", target):
        options = {name: part.constants[name] for name in ("num_warps", "num_stages")}
        compiled = triton.compile(aot_compile.source(part), GPUTarget("cuda", target.architecture, 32), options)
        found.setdefault(target.architecture, []).append(compiled.metadata.shared)
print(json.dumps(found))
"""


def test_tiles_fit_the_shared_memory_of_the_device() -> None:
    """The largest: compute capability 8.6 and 12.0 give a program 99 KiB, and so might a Hopper."""
    pytest.importorskip("triton")
    found = in_process(SMALL, None)
    assert set(found) == {"86", "120", "90"}
    assert all(0 < shared <= 99 * 1024 for kernels in found.values() for shared in kernels), found


@pytest.mark.parametrize("folder", [None, OLDER], ids=["installed", "3.6"])
def test_what_hopper_executes(folder: Path | None) -> None:
    """At the target: tensor cores of Hopper that do not wait for each other, loops that are understood, floors."""
    triton = pytest.importorskip("triton")
    if folder is not None and triton.__version__.startswith("3.6"):
        pytest.skip("Triton 3.6 is the installed one")
    if folder is not None and not (folder / "triton/__init__.py").exists():
        pytest.skip(f"no Triton 3.6 in {folder}: make test puts it there")
    attention, assignment = ("target", "gather", "last_block", "pim"), ("kmeans_exact", "kmeans_fast", "kmeans_narrow")
    costs = in_process(COSTS, attention + assignment, folder)
    assert len(costs) == 3 * len(attention) + len(assignment)
    for cost in costs:
        assert cost["problems"] == [], cost
        assert cost["hgmma"] and cost["notes"] == [], cost
        loop = cost["loops"].get("product", cost["loops"]["tile"])
        assert loop["tensor"] > 0 and cost["floors"][cost["binding"]] == max(cost["floors"].values())
        assert loop["trips"] >= cost["programs"] / 2 > 0
        # While a tile is computed, the next one is on its way.
        assert loop["copies_in_flight"] >= loop["copies"] > 0, cost
        assert 0 < cost["visible"] <= cost["executed"]
        assert cost["floors"]["tensor cores"] >= cost["tensor_visible"] > 0
        assert cost["resident"] >= 1


def test_serialized_products_and_spills_are_errors() -> None:
    """What ptxas of Triton 3.6 said of a kernel whose products waited for each other."""
    pytest.importorskip("triton")
    from bench import aot_compile

    report = (ROOT / "tests/data/key_gradient_kernel_triton3.6_sm90.ptxas").read_text()
    warnings = aot_compile.assembler_warnings(report)
    assert len(warnings) == 1 and "C7515" in warnings[0]
    compiled = partial(
        aot_compile.Compiled, "key_gradient_kernel", "plain", 64, architecture=90, rows=32, keys=128, warps=8, stages=2,
        registers=176, shared=49408, mma=12, asynchronous_copies=6,
    )  # fmt: skip
    clean = {"spill_stores": 0, "spill_loads": 0, "warnings": ()}
    assert compiled("bf16", **clean).problems() == []
    assert "serialized" in compiled("bf16", **clean | {"warnings": warnings}).problems()[0]
    assert "spills 8 + 0 bytes" in compiled("fp16", **clean | {"spill_stores": 8}).problems()[0]
    assert compiled("fp32", **clean | {"spill_stores": 8}).problems() == []
    other = aot_compile.assembler_warnings("ptxas warning : Value of threads per SM is out of range\n" + report)
    assert other[0].startswith("warning") and len(other) == 2


def test_problems_end_the_command_with_status_1(monkeypatch, capsys, tmp_path: Path) -> None:
    """After the record is written."""
    pytest.importorskip("triton")
    pytest.importorskip("tyro")
    from bench import __main__ as command
    from bench import aot

    monkeypatch.setattr(aot, "of_shapes", lambda options: ({"kernels": []}, ["key_gradient_kernel: serialized"]))
    with pytest.raises(SystemExit) as end:
        command.main(["aot", "--shapes", "target", "--output", str(tmp_path)])
    assert end.value.code == 1
    (record,) = tmp_path.glob("aot_static_*.json")
    assert json.loads(record.read_text())["problems"] == ["key_gradient_kernel: serialized"]
    assert "ERROR key_gradient_kernel: serialized" in capsys.readouterr().out


def test_unknown_shapes_are_refused() -> None:
    pytest.importorskip("triton")
    from bench import aot

    with pytest.raises(ValueError, match="unknown shapes nowhere; there are target, "):
        aot.of_shapes(aot.AotReport(shapes=("nowhere",)))


def test_another_scale_is_no_other_kernel() -> None:
    """It is an argument at run time: the same types, constants and alignments, so the same compiled kernel."""
    pytest.importorskip("triton")
    from bench import aot, aot_compile
    from mapet_kernels.triton_launch import Launch

    def scaled(part: Launch, scale: float) -> Launch:
        given = tuple(scale if isinstance(value, float) else value for value in part.arguments)
        assert given != part.arguments
        return Launch(part.kernel, part.programs, given, part.constants)

    for part in aot.launches(64, "fp16", "plain", launch.TARGETS[90]):
        sources = [aot_compile.source(x) for x in (part, scaled(part, 0.7))]
        assert sources[0].hash() == sources[1].hash()


def test_launch_table_is_a_pure_function() -> None:
    assert [launch.padded_size(size) for size in (1, 16, 17, 80, 128)] == [16, 16, 32, 128, 128]
    targets = [launch.target_of(capability, 99 * 1024) for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))]
    assert [target.has_wgmma for target in targets] == [False, False, True, True, False]
    with pytest.raises(ValueError, match=r"capability 8.0 or newer, this device has 7.5"):
        launch.target_of((7, 5), 64 * 1024)
