"""compute-sanitizer over the kernels of two-stream attention, at small awkward shapes; `make test-gpu` has all ops."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.harvesting.common import device_of
from bench.harvesting.part import Run, Skipped

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "sanitizer_cases.py"
OP = "two_stream_attention"
TOOLS = ("memcheck", "racecheck", "initcheck")
FIRST_SHARE = 0.7
ERRORS_FOUND = 9


def command(sanitizer: str, tool: str) -> list[str]:
    """One tool over the cases."""
    return [
        sanitizer, "--tool", tool, "--error-exitcode", str(ERRORS_FOUND),
        sys.executable, str(CASES), "cuda", "--op", OP,
    ]  # fmt: skip


def measure(run: Run) -> None:
    """A row "check" of each tool, with its summary; the whole report is in the log.

    Raises:
        Skipped: there is no compute-sanitizer, it does not support the device, or this is a dry run.
    """
    device_of(run)
    if not CASES.exists():
        raise Skipped("the checkout has no tests/sanitizer_cases.py")
    if run.dry:
        raise Skipped(
            f"a dry run has no sanitizer; a GPU would run: {' '.join(command('compute-sanitizer', TOOLS[0]))}"
        )
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{toolkit}/bin")
    if sanitizer is None:
        raise Skipped("compute-sanitizer is neither on PATH nor in the CUDA toolkit")
    for tool in TOOLS:  # the one that says most first, and with most of the time, much of which compiling takes
        if run.left() > 1:
            check(run, sanitizer, tool, FIRST_SHARE * run.left())


def check(run: Run, sanitizer: str, tool: str, seconds: float) -> None:
    """One tool within its share of the time; what it said until then is told where that is over."""
    # Without torch's caching allocator every tensor is an allocation whose ends are known.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    report = run.folder / "logs" / f"{run.name}_{tool}.log"
    try:
        with report.open("wb") as file:
            done = subprocess.run(
                command(sanitizer, tool), stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
                timeout=seconds, check=False,
            )  # fmt: skip
        code: int | None = done.returncode
    except subprocess.TimeoutExpired:
        code = None
    text = report.read_text(errors="replace")
    if "Device not supported" in text:
        raise Skipped("compute-sanitizer does not support this device, or not in this sandbox")
    run.record(
        "check", what=f"compute-sanitizer {tool}", dtype="fp16", error=None, allowed=None, ok=code == 0,
        returncode=code, summary=summary(text),
    )  # fmt: skip


def summary(report: str) -> str:
    """The tool's own lines of a summary, or the last line where it did not come so far."""
    lines = [line for line in report.splitlines() if line.strip()]
    said = [line.lstrip("= ") for line in lines if "SUMMARY" in line]
    return "; ".join(said) or (lines[-1] if lines else "nothing was printed")
