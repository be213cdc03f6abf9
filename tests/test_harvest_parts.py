"""The harvest's own parts, gone through on a CPU, and what they read and choose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harvest_data import Harvest, read
from bench.harvesting import counters, sanitizer, volta
from bench.harvesting import parts as registry
from bench.harvesting.part import Part, Run, read_records

ROOT = Path(__file__).parent.parent
NO_CPU = {"counters", "volta_kernels", "sanitizer"}
"""Parts that say in a dry run what they would run."""


def dry_run(output: Path, *arguments: str, path: str = "") -> Harvest:
    """From a folder that is not the checkout, without the package on the path."""
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "bench/harvest.py"), "--dry-run", "--minutes", "40", "--output", str(output)]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, cwd=output.parent, check=False
    )
    found = read(output)
    outcomes = {name: x for name, x in found.outcomes.items() if x["status"] not in ("ok", "skipped")}
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{outcomes}"
    return found


def statuses(harvest: Harvest) -> dict[str, str]:
    return {name: outcome["status"] for name, outcome in harvest.outcomes.items()}


@pytest.mark.long
def test_a_dry_run_goes_through_every_part_of_both_calls(tmp_path: Path) -> None:
    first = dry_run(tmp_path / "first")
    kinds = first.rows
    assert not first.damage and statuses(first) == {
        part.name: "skipped" if part.name in NO_CPU else "ok" for part in registry.FIRST
    }
    assert "ncu --csv" in first.outcomes["counters"]["reason"]
    assert all(row["ok"] for row in kinds["check"]) and len(kinds["check"]) > 20
    assert [row["value"] > 0 for row in kinds["ceiling"]] == [True, True]
    times = {(row["op"], row["way"]) for row in kinds["time"]}
    assert {(op, "ours") for op in ("forward", "dq", "dkdv", "backward")} < times
    assert {("forward", way) for way in ("sdpa", "sdpa_mask", "official", "flex")} < times
    assert {row["default"] for row in kinds["time"] if row["op"] == "dq" and row["way"] == "ours"} == {True, False}
    steps = {(row["model"], row["mode"], row["way"]) for row in kinds["step"]}
    modes = (("eager", "ours"), ("eager_skip_dropped", "ours"), ("compiled", "ours"), ("eager", "official"))
    assert steps == {(model, *mode) for model in ("base", "small", "tiny") for mode in modes}
    assert {row["way"] for row in kinds["kmeans"]} >= {"exact", "fast", "torch_chunked"}
    assert [row["recompute"] for row in kinds["memory"]] == ["none", "cheap", "blocks"]
    assert (tmp_path / "first" / "profile.txt").read_text() == kinds["profile"][0]["table"]
    came_back = list((tmp_path / "first").iterdir())
    assert {path.name for path in came_back} == {"harvest.tar.gz", "harvest.log", "profile.txt"}

    second = dry_run(tmp_path / "second", "--second", str(tmp_path / "first"))
    names = ["machine", "tuned", "step_tuned", "step_volta", "volta_kernels", "sanitizer"]
    assert statuses(second) == {name: "skipped" if name in NO_CPU else "ok" for name in names}
    assert {row["tuned"] for row in second.of("step", part="step_tuned")} == {True}
    assert list(second.outcomes)[-1] == "sanitizer"


@pytest.mark.slow
def test_torch_triton_and_numpy_are_enough(tmp_path: Path) -> None:
    """With no other package to be found, for the kernels and for the whole step."""
    wanted = ["machine", "check_embedding_kmeans", "tune", "step_tiny"]
    bare = dry_run(tmp_path / "bare", "--parts", *wanted, path=str(ROOT / "tests/bare_python"))
    assert statuses(bare) == dict.fromkeys(wanted, "ok")
    packages = "import importlib.util as u; print([u.find_spec(n) is None for n in ('timm', 'tyro', 'torch')])"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests/bare_python")}
    seen = subprocess.run([sys.executable, "-c", packages], env=environment, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[True, True, False]"


def test_ncu_is_asked_for_the_sections_and_its_report_is_read() -> None:
    command = counters.command("/opt/ncu", 20.0)
    assert command[0] == "/opt/ncu" and command[command.index("--clock-control") + 1] == "none"
    assert {"SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "MemoryWorkloadAnalysis"} < set(command)
    assert command[-4:] == [sys.executable, "-m", "bench.harvesting.counters", "20.0"]
    forward, gradient = counters.parse((ROOT / "tests/data/ncu_raw.txt").read_text())
    assert forward["kernel"] == "forward_kernel" and gradient["kernel"] == "key_gradient_kernel"
    assert forward["metrics"] == {
        "gpu__time_duration.sum": 1351.2,
        "sm__inst_issued.avg.pct_of_peak_sustained_active": 71.5,
        "launch__registers_per_thread": 128.0,
    }
    assert forward["units"]["gpu__time_duration.sum"] == "us"
    assert "sm__inst_issued.avg.pct_of_peak_sustained_active" not in gradient["metrics"]
    with pytest.raises(ValueError, match="no table"):
        counters.parse("==ERROR== ERR_NVGPUCTRPERM\n")


FAKE_SANITIZER = """\
#!/bin/sh
echo ========= COMPUTE-SANITIZER
case $2 in
  memcheck) echo launched: forward_kernel; echo "========= ERROR SUMMARY: 0 errors"; exit 0;;
  racecheck) echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"; exit 9;;
  *) echo "case: one"; exec sleep 60;;
esac
"""


def test_a_tool_that_finds_errors_or_does_not_end_is_a_check_that_failed(tmp_path: Path) -> None:
    """With a stand-in for compute-sanitizer; what the third said before its time was over is told."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE_SANITIZER)
    tool.chmod(0o755)
    for name in ("parts", "logs"):
        (tmp_path / name).mkdir()
    run = Run("sanitizer", tmp_path, 60.0)
    for name in sanitizer.TOOLS:
        sanitizer.check(run, str(tool), name, 2.0)
    rows = read_records(run.records)
    assert [(row["what"].split()[1], row["ok"], row["returncode"]) for row in rows] == [
        ("memcheck", True, 0), ("racecheck", False, 9), ("initcheck", False, None),
    ]  # fmt: skip
    assert rows[1]["summary"].startswith("RACECHECK SUMMARY: 2 hazards") and rows[2]["summary"] == "case: one"


def test_the_kernels_of_a_v100_are_built_without_a_network(tmp_path: Path) -> None:
    command = volta.build_command(tmp_path)
    assert {"--no-deps", "--no-build-isolation", "--no-index"} < set(command) and str(tmp_path) in command


def test_the_second_call_does_again_what_failed_and_takes_the_best_configurations() -> None:
    found = read(ROOT / "tests/data/harvest").times
    ended = {part.name: {"status": "ok", "returncode": 0} for part in registry.FIRST}
    ended["kmeans"] = {"status": "timed out", "returncode": -9}
    ended["counters"] = {"status": "skipped", "returncode": 0}  # there is no ncu, nor will there be
    ended["memory"] = {"status": "skipped", "returncode": None}  # no time was left
    del ended["step_tiny"]
    parts = registry.second(Harvest({"parts": ended}, times=found))
    assert [part.name for part in parts][:5] == ["machine", "step_tiny", "kmeans", "memory", "tuned"]
    best = {op: tuple(config.values()) for op, config in parts[4].arguments["best"].items()}
    assert best == {"forward": (64, 64, 4, 3), "dq": (64, 64, 4, 3), "dkdv": (32, 128, 8, 2)}
    assert parts[-1].name == "sanitizer"
    again = registry.second(Harvest())[1 : len(registry.FIRST)]
    assert [part.name for part in again] == [part.name for part in registry.FIRST[1:]]
    assert sum(part.seconds for part in again) == pytest.approx(registry.AGAIN)


def test_slices_keep_to_the_time_of_a_call() -> None:
    slices = {}
    for part in registry.FIRST:
        slices[part.stage or part.name] = part.seconds
    assert sum(slices.values()) == 380
    assert all(isinstance(part, Part) and part.name.replace("_", "").isalnum() for part in registry.FIRST)
    assert len({part.name for part in registry.FIRST}) == len(registry.FIRST)
