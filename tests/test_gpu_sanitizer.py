"""compute-sanitizer over all kernels (reliability, assertion 16), and what of it needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sanitizer_cases import kernel_modules, kernel_names

CASES = Path(__file__).with_name("sanitizer_cases.py")
SECONDS = 140
"""Limit of one tool, most of it for compiling the kernels where they are not yet in Triton's cache."""
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


def run_cases(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """The cases under `command`, both outputs in one."""
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        env=os.environ | environment,
        cwd=CASES.parent.parent,
        check=False,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not on PATH nor in the CUDA toolkit")
@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "racecheck"])
def test_assertion_16_no_error_in_any_kernel(tool: str) -> None:
    """Without torch's caching allocator, so that every tensor is an allocation whose ends are known.

    initcheck also reports torch's own kernels, so there only complaints that name ours count.
    """
    command = [sanitizer(), "--tool", tool, "--error-exitcode", str(ERRORS_FOUND), sys.executable, str(CASES), "cuda"]
    result = run_cases(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if "Device not supported" in result.stdout:
        pytest.skip("compute-sanitizer does not support this device, or not in this sandbox")
    assert not errors_in(result.stdout, kernel_names(kernel_modules())), result.stdout[-6000:]
    assert "launched:" in result.stdout, result.stdout[-6000:]
    assert result.returncode in ((0, ERRORS_FOUND) if tool == "initcheck" else (0,)), result.stdout[-6000:]


def test_every_kernel_is_launched_by_the_cases() -> None:
    """In the interpreter, with the smallest shapes."""
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = run_cases([sys.executable, str(CASES), "cpu", "3e5"], environment)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "forward_kernel" in result.stdout and "assemble_kernel" in result.stdout


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
