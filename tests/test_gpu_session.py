"""What a run on a GPU keeps and survives (gpu_session.py), shown with a device that breaks on a CPU; and that the GPU
tests need no package beyond those of absent_packages.py."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import absent_packages
import pytest

TESTS = Path(__file__).parent
BREAKING_DEVICE = """
import ctypes, sys, time, types
import pytest

pytestmark = pytest.mark.gpu
BROKEN = False

def synchronize():
    if BROKEN:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

def break_device():
    global BROKEN
    BROKEN = True

# What gpu_session.py asks of torch, which takes seconds to import.
sys.modules["torch"] = types.SimpleNamespace(
    cuda=types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
)
"""
"""Opens every toy file of tests."""


def run_pytest(folder: Path, source: str, *arguments: str, timeout: float = 120) -> tuple[str, str]:
    """(output, what --keep-failures kept) of the tests of a source in a process of their own."""
    (folder / "test_toy.py").write_text(BREAKING_DEVICE + source)
    process = subprocess.run(
        command(folder, *arguments), env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    kept = folder / "logs" / "failures.txt"
    return process.stdout + process.stderr, kept.read_text() if kept.exists() else ""


def command(folder: Path, *arguments: str) -> list[str]:
    plugins = ["-p", "gpu_session", "-p", "no:cacheprovider", "--rootdir", str(folder), "-W", "ignore"]
    kept = ["--keep-failures", str(folder / "logs" / "failures.txt")]
    return [sys.executable, "-m", "pytest", str(folder / "test_toy.py"), "-v", "-rsf", *plugins, *kept, *arguments]


def environment() -> dict[str, str]:
    """Without what pytest-xdist sets in its workers, of which this test may be one."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


FIRST_BREAKS = """
def test_1_breaks():
    break_device()
    assert False, "wrong numbers"

def test_2_is_innocent():
    synchronize()
"""
BREAKS_UNNOTICED = """
def test_1_breaks_unnoticed():
    break_device()

def test_2_is_innocent():
    synchronize()
"""


def test_after_the_context_died_tests_are_skipped_by_the_name_of_the_one_that_killed_it(tmp_path: Path) -> None:
    output, kept = run_pytest(tmp_path, FIRST_BREAKS)
    assert "1 failed, 1 skipped" in output
    assert re.search(r"SKIPPED .* the CUDA context died in .*test_toy.py::test_1_breaks\b", output)
    assert "assert False" in kept and "wrong numbers" in kept and "illegal memory access" in kept


def test_an_error_that_only_the_device_knows_is_charged_to_its_test(tmp_path: Path) -> None:
    output, kept = run_pytest(tmp_path, BREAKS_UNNOTICED)
    assert "1 failed, 1 skipped" in output and "test_1_breaks_unnoticed FAILED" in output
    assert "the device reports, after the test: RuntimeError: CUDA error: an illegal memory access" in kept


def test_a_fresh_worker_takes_the_tests_that_are_left(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    others = "".join(f"\ndef test_{i}_is_innocent():\n    synchronize()\n" for i in range(3, 9))
    output, kept = run_pytest(tmp_path, FIRST_BREAKS + others, "-n", "1", "--dist", "worksteal")
    assert "7 passed" in output and "replacing crashed worker" in output
    failed = set(re.findall(r"^FAILED \S*::(\w+)", output, re.MULTILINE))
    assert failed == {"test_1_breaks"}
    assert "wrong numbers" in kept and "crashed while running" in kept


def test_a_crash_keeps_earlier_failures_and_the_stack(tmp_path: Path) -> None:
    source = """
def test_1_fails():
    assert 1 + 1 == 3, "said before the crash"

def test_2_crashes():
    ctypes.string_at(0)
"""
    output, kept = run_pytest(tmp_path, source)
    assert "said before the crash" not in output, "the crash takes pytest's own summary along"
    assert "said before the crash" in kept and "test_1_fails failed (call)" in kept
    assert "Segmentation fault" in kept and "in test_2_crashes" in kept


def test_a_run_killed_at_its_limit_keeps_what_failed_until_then(tmp_path: Path) -> None:
    (tmp_path / "test_toy.py").write_text(
        BREAKING_DEVICE
        + '\ndef test_1_fails():\n    assert False, "early"\n\ndef test_2_hangs():\n    time.sleep(600)\n'
    )
    kept = tmp_path / "logs" / "failures.txt"
    process = subprocess.Popen(command(tmp_path), env=environment(), stdout=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + 100
        while not (kept.exists() and "early" in kept.read_text()):
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "test_1_fails failed (call)" in kept.read_text()


def test_no_test_starts_when_the_time_is_over(tmp_path: Path) -> None:
    source = """
def test_1_takes_long(request):
    request.config.pluginmanager.get_plugin("gpu-session").stop_at = time.time() - 1

def test_2_is_late():
    pass
"""
    output, kept = run_pytest(tmp_path, source, "--stop-after", "1000")
    assert "1 passed, 1 skipped" in output and "not started: the time of the run was over" in output
    assert not kept


@pytest.mark.long
def test_a_worker_that_hangs_ends_and_the_run_with_it(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text("import gpu_session\ngpu_session.GRACE = 2.0\n")
    source = """
def test_1_fails():
    assert False, "early"

def test_2_hangs():
    time.sleep(600)

def test_3_is_late():
    pass
"""
    output, kept = run_pytest(tmp_path, source, "-n", "1", "--stop-after", "10")
    assert "2 failed, 1 skipped" in output and "early" in output
    assert "test_2_hangs still ran 2 s after the end of the run" in kept and "in test_2_hangs" in kept


def gpu_files() -> list[str]:
    """The files that `make test-gpu` collects."""
    return [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in path.read_text()]


@pytest.mark.slow
def test_gpu_tests_are_collected_without_the_packages_that_a_gpu_machine_lacks() -> None:
    """Files that need more are skipped by name, those of the kernels are not among them."""
    missing = absent_packages.absent()
    assert {"tyro", "open_clip", "rich", "matplotlib", "sklearn", "torchvision"} <= missing
    assert not {"torch", "triton", "numpy", "pytest", "hypothesis", "timm", "mapet_kernels"} & missing
    options = ["--collect-only", "-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider", "-p", "absent_packages"]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *gpu_files(), *options],
        env=environment() | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    collected = set(re.findall(r"^tests/(\w+)\.py::", found.stdout, re.MULTILINE))
    assert collected >= {
        "test_gpu", "test_gpu_cuda", "test_gpu_memory", "test_gpu_sanitizer", "test_kmeans", "test_kmeans_fit",
    }  # fmt: skip
    for test in ("test_assertion_13_error_budget", "test_assertion_15_repeats", "test_cuda_graph_replays"):
        assert test in found.stdout
    skipped = dict(re.findall(r"SKIPPED .*?tests/(\w+)\.py:\d+: (.*)", found.stdout))
    assert set(skipped) <= {"test_gpu_bench", "test_gpu_step", "test_tokenizers"}
    assert all("could not import" in reason for reason in skipped.values())
