"""Nsight Compute over the three attention kernels: what the hardware counted, as ncu.csv and a row for each kernel.

Run as a module it is the program that ncu watches.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import tune
from bench.harvesting.common import attention_shape, device_of, dtypes_of, tool
from bench.harvesting.kernels import entry_for
from bench.harvesting.part import Run, Skipped

SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "SchedulerStats", "MemoryWorkloadAnalysis",
    "Occupancy", "LaunchStats",
)  # fmt: skip
WATCHED = ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")
IDENTITY = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Device", "CC")
"""Columns of a raw page that are no metrics."""


def command(ncu: str, seconds: float) -> list[str]:
    """ncu over this module. The clocks stay as they are, as on every other machine."""
    sections = [word for name in SECTIONS for word in ("--section", name)]
    return [
        ncu, "--csv", "--page", "raw", "--clock-control", "none", *sections, "--profile-from-start", "off",
        "--target-processes", "all", "--kernel-name", f"regex:{'|'.join(WATCHED)}",
        sys.executable, "-m", "bench.harvesting.counters", f"{seconds:.1f}",
    ]  # fmt: skip


def measure(run: Run) -> None:
    """Watch one launch of each kernel at the target shape.

    Raises:
        Skipped: there is no ncu, it may not read the counters here, or this is a dry run.
    """
    device_of(run)
    if run.dry:
        watched(run)  # all but ncu itself
        raise Skipped(f"a dry run has no counters; a GPU would run: {' '.join(command('ncu', run.left()))}")
    if (ncu := tool("ncu")) is None:
        raise Skipped("ncu (Nsight Compute) is neither on PATH nor in the CUDA toolkit")
    with (run.folder / "ncu.csv").open("wb") as file:
        done = subprocess.run(command(ncu, run.left()), stdout=file, check=False)
    report = (run.folder / "ncu.csv").read_text(errors="replace")
    try:
        kernels = parse(report)
    except ValueError as error:
        print(report[-4000:])
        if "ERR_NVGPUCTRPERM" in report or "LibraryNotLoaded" in report:
            raise Skipped("ncu may not read the hardware counters on this machine") from error
        raise
    for kernel in kernels:
        run.record("counters", shape=str(attention_shape(run)), **kernel)
    if done.returncode:
        raise RuntimeError(f"ncu ended with code {done.returncode}")


def parse(report: str) -> list[dict[str, Any]]:
    """Kernels in the order they ran, with metrics and units by name, from `ncu --csv --page raw`.

    Below the header stands a line of units, then a line for each kernel.

    Raises:
        ValueError: there is no table.
    """
    lines = report.splitlines()
    header = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        raise ValueError("no table in ncu's output; did any kernel run?")
    units, *rows = csv.DictReader(lines[header:])
    found = []
    for row in rows:
        numbers = {name: number(text) for name, text in row.items() if name not in IDENTITY}
        metrics = {name: value for name, value in numbers.items() if value is not None}
        told = {name: units[name] for name in metrics if units.get(name)}
        found.append({"kernel": row["Kernel Name"].split("(")[0], "metrics": metrics, "units": told})
    return found


def number(text: str | None) -> float | None:
    """A number as ncu writes it, with commas between thousands; None for anything else."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def watched(run: Run) -> None:
    """Each kernel twice: unwatched, which compiles it, and then between the profiler's start and stop."""
    device, shape = device_of(run), attention_shape(run)
    for kernel in tune.KERNELS:
        entry = entry_for(kernel, next(iter(dtypes_of(run, "bf16"))), shape, device)
        call = tune.Runner(entry, shape, device).call(entry.present())
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    watched(Run("watched", Path(), float(sys.argv[1])))
