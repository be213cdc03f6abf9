"""The machine: versions, clocks, and the ceilings that all other figures are held against."""

from __future__ import annotations

import os
import platform
import shutil

from bench import records, roofline, timing
from bench.harvesting.common import DTYPES, device_of
from bench.harvesting.part import Run

TOOLS = ("nvcc", "ncu", "compute-sanitizer", "nvidia-smi", "git")
PACKAGES = ("numpy", "timm", "torchvision", "safetensors", "pillow", "tyro", "xformers", "torchao", "flash-attn")


def measure(run: Run) -> None:
    """One row of what is here, one of the state before and after, and one of each ceiling."""
    device = device_of(run)
    here = records.environment()
    told = {"device": here["device"], "versions": here["versions"]}
    run.record(
        "machine", **told, cores=os.cpu_count(), threads=here["threads"], system=platform.platform(),
        packages={name: records.version(name) for name in PACKAGES}, tools={name: shutil.which(name) for name in TOOLS},
        state=records.device_state(device),
    )  # fmt: skip
    clock = timing.clock_for(device)
    for name in ("fp32",) if run.dry else ("bf16", "fp16", "fp32"):
        rates = roofline.measure(device, {name: DTYPES[name]}, clock, repeats=3 if run.dry else 10)
        run.record("ceiling", name="copy_bytes_per_s", value=rates.bytes_per_second)
        run.record("ceiling", name=f"matmul_{name}_flops_per_s", value=rates.flop_per_second[name])
    run.record("machine", **told, state=records.device_state(device))
