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
"""
TOYS = {
    "after the context died tests are skipped by the name of the one that killed it": (
        FIRST_BREAKS + "def test_2_is_innocent(): synchronize()",
        ("1 failed, 1 skipped", r"SKIPPED .* the CUDA context died in .*test_toy.py::test_1_breaks\b"),
        ("assert False", "wrong numbers", "illegal memory access"),
    ),
    "an error that only the device knows is charged to its test": (
        "def test_1_breaks_unnoticed(): break_device()\ndef test_2_is_innocent(): synchronize()",
        ("1 failed, 1 skipped", "test_1_breaks_unnoticed FAILED"),
        ("the device reports, after the test: RuntimeError: CUDA error: an illegal memory access",),
    ),
    "a crash keeps earlier failures and the stack": (
        'def test_1_fails(): assert 1 + 1 == 3, "said before"\ndef test_2_crashes(): ctypes.string_at(0)',
        ("test_1_fails FAILED",),
        ("said before", r"test_1_fails failed \(call\)", "Segmentation fault", "in test_2_crashes"),
    ),
    "no test starts when the time is over": (
        """
def test_1_takes_long(request):
    request.config.pluginmanager.get_plugin("gpu-session").stop_at = time.time() - 1

def test_2_is_late(): pass
""",
        ("1 passed, 1 skipped", "not started: the time of the run was over"),
        (),
        *("--stop-after", "1000"),
    ),
    "a fresh worker takes the tests that are left": (
        FIRST_BREAKS + "".join(f"def test_{i}_is_innocent(): synchronize()\n" for i in range(2, 9)),
        ("7 passed", "replacing crashed worker"),
        ("wrong numbers", "crashed while running"),
        *("-n", "1", "--dist", "worksteal"),
    ),
    "a worker that hangs ends and the run with it": (
        """
def test_1_fails(): assert False, "early"
def test_2_hangs(): time.sleep(600)
def test_3_is_late(): pass
""",
        ("2 failed, 1 skipped", "early"),
        ("test_2_hangs still ran 2 s after the end of the run", "in test_2_hangs"),
        *("-n", "1", "--stop-after", "10"),
    ),
}
"""A source, what the run prints and what --keep-failures keeps, and options."""


@pytest.mark.parametrize("toy", [pytest.param(x, marks=pytest.mark.long) if "hangs" in x else x for x in TOYS])
def test_a_run_whose_device_breaks(tmp_path: Path, toy: str) -> None:
    """Each in a process of its own."""
    source, printed, keeps, *options = TOYS[toy]
    if "-n" in options:
        pytest.importorskip("xdist")
        (tmp_path / "conftest.py").write_text("import gpu_session\ngpu_session.GRACE = 2.0\n")
    (tmp_path / "test_toy.py").write_text(BREAKING_DEVICE + source)
    arguments = command(tmp_path, *options)
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    log = tmp_path / "logs" / "failures.txt"
    output, kept = done.stdout + done.stderr, log.read_text() if log.exists() else ""
    assert all(re.search(text, output) for text in printed), output
    assert all(re.search(text, kept) for text in keeps) and (keeps or not kept), kept
    if "crash keeps" in toy:
        assert "said before" not in output, "the crash takes pytest's own summary along"
    if "fresh worker" in toy:
        assert set(re.findall(r"^FAILED \S*::(\w+)", output, re.MULTILINE)) == {"test_1_breaks"}


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
