"""One op under Nsight Compute, as a table: python profiling/op_counters.py two_stream_attention vit --backend triton

Runs the op on a case of the registry, forward and backward, under `ncu`, and prints for every kernel its time, the
shares of the peak rates of arithmetic, memory and tensor cores, occupancy, registers and shared memory. Needs a GPU and
ncu.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import tyro

from mapet_kernels.registry import REGISTRY

METRICS = {
    "gpu__time_duration.sum": "time us",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "arithmetic %",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor cores %",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "dram__bytes.sum": "DRAM MB",
    "lts__t_sector_hit_rate.pct": "L2 hits %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block": "shared KB",
}
"""Nsight Compute's name of a metric -> the column it becomes."""

UNITS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3, "second": 1e6}
UNITS |= {"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3}
UNITS |= {"byte/block": 1e-3, "Kbyte/block": 1.0, "Mbyte/block": 1e3}


@dataclass(frozen=True)
class OpCounters:
    """What to run under ncu."""

    op: tyro.conf.Positional[str] = "two_stream_attention"
    """Of the registry."""
    shape: tyro.conf.Positional[str] = "vit"
    """Of the op."""
    backend: str = "auto"
    dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    batch: int = 64
    """Images, where the op's shapes have a batch."""
    inside: Annotated[bool, tyro.conf.Suppress] = False
    """Set by this script for the process that ncu watches."""


def main() -> None:
    options = tyro.cli(OpCounters, description=__doc__)
    if options.inside:
        run_op(options)
        return
    if (ncu := shutil.which("ncu")) is None:
        sys.exit("op_counters: ncu (Nsight Compute) is not on PATH; it comes with the CUDA toolkit")
    if not torch.cuda.is_available():
        sys.exit("op_counters: torch finds no CUDA device")
    command = [ncu, "--csv", "--clock-control", "none", "--metrics", ",".join(METRICS), "--target-processes", "all"]
    command += ["--profile-from-start", "off", sys.executable, *sys.argv, "--inside"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"op_counters: ncu failed with code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(as_table(parse(done.stdout)))


def run_op(options: OpCounters) -> None:
    """The op forward and backward on the GPU, once unwatched and once watched."""
    spec = REGISTRY[options.op]
    shape = spec.shapes[options.shape]
    if hasattr(shape, "batch"):
        shape = replace(shape, batch=options.batch)
    case = spec.make_case(shape, getattr(torch, options.dtype), "cuda")
    for watched in (False, True):
        inputs = {n: x if n in case.fixed else x.detach().requires_grad_() for n, x in case.inputs.items()}
        torch.cuda.synchronize()
        if watched:
            torch.cuda.profiler.start()
        result = spec.function(**inputs, **case.options, backend=options.backend)
        parts = [part for part in (result if isinstance(result, tuple) else (result,)) if part is not None]
        if spec.differentiable:
            wanted = [x for x in inputs.values() if x.requires_grad]
            torch.autograd.grad(parts, wanted, [torch.ones_like(part) for part in parts])
        torch.cuda.synchronize()
        if watched:
            torch.cuda.profiler.stop()


def parse(report: str) -> list[dict[str, str | float]]:
    """Rows of kernels, in the order they ran, from the text of `ncu --csv`."""
    lines = report.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        raise ValueError("no table in ncu's output; did any kernel run?")
    kernels: dict[str, dict[str, str | float]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[header:]))):
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"].split("(")[0]})
        if (column := METRICS.get(row["Metric Name"])) is not None:
            kernel[column] = float(row["Metric Value"].replace(",", "")) * UNITS.get(row["Metric Unit"], 1.0)
    return list(kernels.values())


def as_table(kernels: list[dict[str, str | float]]) -> str:
    """A Markdown table of kernels, and the sum of their times."""
    columns = list(METRICS.values())
    lines = [f"| kernel | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for kernel in kernels:
        cells = (f"{kernel[column]:.1f}" if column in kernel else "-" for column in columns)
        lines.append(f"| {kernel['kernel']} | {' | '.join(cells)} |")
    total = sum(float(kernel.get("time us", 0.0)) for kernel in kernels)
    return "\n".join([*lines, f"\n{len(kernels)} kernels, {total:.1f} us"])


if __name__ == "__main__":
    main()
