"""compute-sanitizer over all kernels (reliability, assertion 16), and what of it needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sanitizer_cases import MOST_FLOP, cases, kernel_modules, kernel_names

from mapet_kernels.registry import REGISTRY

CASES = Path(__file__).with_name("sanitizer_cases.py")
TOOLS = ("memcheck", "initcheck", "racecheck")
PARTS = {"two_stream_attention": 2}
"""Processes that share the cases of an op; one where it is not named."""
GROUPS = [(op, f"{part}/{PARTS.get(op, 1)}") for op in REGISTRY for part in range(1, PARTS.get(op, 1) + 1)]
SECONDS = 100
"""Limit of one tool on one group, most of it for compiling the kernels where they are not yet in Triton's cache. Spread
over 6 workers, all groups under all tools end within 300 s even if each takes as long."""
ERRORS_FOUND = 9


def sanitizer() -> str | None:
    """The tool's path: on PATH, or in the CUDA toolkit."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{toolkit}/bin")


def errors_in(report: str, kernels: list[str]) -> list[str]:
    """Complaints of a report, each a block of lines, that name one of the kernels."""
    lines = [line.removeprefix("=========").rstrip() for line in report.splitlines() if line.startswith("=========")]
    # A complaint opens with one blank after the equals signs, its details follow further in.
    blocks = re.split(r"\n(?= \S)", "\n".join(lines))
    named = re.compile(rf"\b({'|'.join(map(re.escape, kernels))})\b")
    return [block.strip() for block in blocks if named.search(block)]


def run_cases(command: list[str], environment: dict[str, str], log: Path, seconds: float = SECONDS) -> tuple[str, int]:
    """(output, exit code) of the cases under `command`; both outputs go into one file while they are written.

    When the time is over all processes of the command are killed, and the test fails with the output until then.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | environment | {"PYTHONUNBUFFERED": "1"},
            cwd=CASES.parent.parent,
            process_group=0,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not done after {seconds:.0f} s; the output until then:\n{log.read_text(errors='replace')}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return log.read_text(errors="replace"), process.returncode


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not on PATH nor in the CUDA toolkit")
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(("op", "part"), GROUPS)
def test_assertion_16_no_error_in_any_kernel(op: str, part: str, tool: str, tmp_path: Path) -> None:
    """Without torch's caching allocator, so that every tensor is an allocation whose ends are known.

    initcheck also reports torch's own kernels, so there only complaints that name ours count.
    """
    command = [sanitizer(), "--tool", tool, "--error-exitcode", str(ERRORS_FOUND), sys.executable, str(CASES), "cuda"]
    command += ["--op", op, "--part", part]
    output, code = run_cases(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, tmp_path / "log.txt")
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device, or not in this sandbox")
    assert not errors_in(output, kernel_names(kernel_modules(op))), output[-6000:]
    assert "launched:" in output, output[-6000:]
    assert code in ((0, ERRORS_FOUND) if tool == "initcheck" else (0,)), output[-6000:]


def test_every_kernel_is_launched_by_the_cases(tmp_path: Path) -> None:
    """In the interpreter, with the smallest shapes."""
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CASES), "cpu", "8e4"]
    output, code = run_cases(command, environment, tmp_path / "log.txt", seconds=400)
    assert code == 0, output[-3000:]
    assert "two_stream_attention.forward_kernel" in output and "permuted_embed.assemble_kernel" in output
    assert output.count("forward_kernel") == 2, "two ops have one"


def test_groups_are_all_cases_each_in_one() -> None:
    """What the workers of a GPU run are given."""
    grouped = [case for op, part in GROUPS for case in cases("cuda", MOST_FLOP, op, part)]
    key = [(spec.name, backend, shape) for spec, backend, shape in grouped]
    assert len(set(key)) == len(key) > 30
    assert set(key) == {(spec.name, backend, shape) for spec, backend, shape in cases("cuda", MOST_FLOP)}
    assert all(cases("cuda", MOST_FLOP, op, part) for op, part in GROUPS)


def test_what_was_printed_before_the_limit_is_reported_and_nothing_runs_on(tmp_path: Path) -> None:
    script = "import os, subprocess, time; print('case: first', flush=True); "
    script += "child = subprocess.Popen(['sleep', '600']); print('child', child.pid, flush=True); time.sleep(600)"
    with pytest.raises(pytest.fail.Exception, match=r"not done after 5 s; the output until then:\ncase: first") as info:
        run_cases([sys.executable, "-c", script], {}, tmp_path / "log.txt", seconds=5)
    child = int(re.search(r"child (\d+)", str(info.value))[1])
    give_up = time.monotonic() + 30
    while running(child) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert not running(child)


def running(process: int) -> bool:
    """Whether it exists and has not ended, waited for or not."""
    try:
        return Path("/proc", str(process), "stat").read_text().split()[2] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


REPORT = """\
launched: forward_kernel
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x70
=========     by thread (0,0,0) in block (0,0,0)
=========
========= Invalid __global__ read of size 2 bytes
=========     at forward_kernel+0x1a0 in kernel.py:211
=========     by thread (3,0,0) in block (1,0,0)
=========         Host Frame: cuLaunchKernel
=========
========= ERROR SUMMARY: 2 errors
"""


def test_complaints_about_our_kernels_are_told_from_others() -> None:
    (error,) = errors_in(REPORT, ["forward_kernel", "key_gradient_kernel"])
    assert error.startswith("Invalid __global__ read of size 2 bytes") and "Host Frame" in error
    assert not errors_in(REPORT, ["key_gradient_kernel", "elementwise_kernel"])
    assert not errors_in("========= ERROR SUMMARY: 0 errors\n", ["forward_kernel"])
