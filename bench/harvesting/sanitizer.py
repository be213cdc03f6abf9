"""compute-sanitizer over the kernels of two-stream attention, at small awkward shapes; `make test-gpu` has all ops."""

from __future__ import annotations

import os
import subprocess
import sys

from bench.harvesting.common import ROOT, device_of, tool
from bench.harvesting.part import Run, Skipped

CASES = ROOT / "tests" / "sanitizer_cases.py"
OP = "two_stream_attention"
TOOLS = ("memcheck", "racecheck", "initcheck")
FIRST_SHARE = 0.7
ERRORS_FOUND = 9


def command(sanitizer: str, name: str) -> list[str]:
    """One tool over the cases."""
    options = [sanitizer, "--tool", name, "--error-exitcode", str(ERRORS_FOUND)]
    return [*options, sys.executable, str(CASES), "cuda", "--op", OP]


def measure(run: Run) -> None:
    """A row "check" of each tool, with its summary; the whole report is in the log.

    Raises:
        Skipped: there is no compute-sanitizer, it does not support the device, or this is a dry run.
    """
    device_of(run)
    if not CASES.exists():
        raise Skipped("the checkout has no tests/sanitizer_cases.py")
    if run.dry:
        words = " ".join(command("compute-sanitizer", TOOLS[0]))
        raise Skipped(f"a dry run has no sanitizer; a GPU would run: {words}")
    if (sanitizer := tool("compute-sanitizer")) is None:
        raise Skipped("compute-sanitizer is neither on PATH nor in the CUDA toolkit")
    for name in TOOLS:  # the one that says most first, and with most of the time, much of which compiling takes
        if run.left() > 1:
            check(run, sanitizer, name, FIRST_SHARE * run.left())


def check(run: Run, sanitizer: str, name: str, seconds: float) -> None:
    """One tool within its share of the time; what it said until then is told where that is over."""
    # Without torch's caching allocator every tensor is an allocation whose ends are known.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    report, code = run.folder / "logs" / f"{run.name}_{name}.log", None
    try:
        with report.open("wb") as file:
            code = subprocess.run(
                command(sanitizer, name), stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
                timeout=seconds, check=False,
            ).returncode  # fmt: skip
    except subprocess.TimeoutExpired:
        pass
    lines = [line for line in report.read_text(errors="replace").splitlines() if line.strip()]
    if any("Device not supported" in line for line in lines):
        raise Skipped("compute-sanitizer does not support this device, or not in this sandbox")
    said = [line.lstrip("= ") for line in lines if "SUMMARY" in line] or lines[-1:] or ["nothing was printed"]
    run.record(
        "check", what=f"compute-sanitizer {name}", dtype="fp16", error=None, allowed=None, ok=code == 0,
        returncode=code, summary="; ".join(said),
    )  # fmt: skip
