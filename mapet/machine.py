"""What this machine is: Python, torch, processor, memory and GPUs, as the doctor and the demo's report print it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mapet.training.precision import automatic

OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    subject: str
    status: Literal["ok", "absent", "problem"]
    detail: str
    advice: str = ""


def machine_findings() -> list[Finding]:
    """Python, torch, processor, memory, and every GPU or why there is none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    instructions, memory = torch.backends.cpu.get_cpu_capability(), main_memory()
    precisions = f"fp32 and bf16 run on it, fp16 needs a GPU; train.precision auto takes {automatic(None)}"
    return [
        Finding("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        torch_finding(),
        Finding("processor", "ok", f"{cores} cores, {instructions}; {precisions}"),
        Finding("memory", "ok" if memory else "absent", f"{memory / 2**30:.1f} GiB" if memory else "unknown"),
        *([gpu_finding(i, properties) for i, properties in enumerate(gpus())] or [no_gpu_finding()]),
    ]


def gpus() -> list[Any]:
    """torch's properties of every CUDA device that it can use."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_properties(i) for i in range(count)]


def torch_finding() -> Finding:
    """The version, and the version of CUDA or ROCm it is built for."""
    built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    if torch.version.hip is not None:
        built_for = f"built for ROCm {torch.version.hip}"
    detail = f"{torch.__version__}, {built_for}"
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return Finding("torch", "problem", detail, "mapet needs torch 2.11 or newer: pip install --upgrade torch")
    return Finding("torch", "ok", detail)


def main_memory() -> int:
    """Bytes that this process may use, a container's limit included; 0 where they cannot be read."""
    known = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    for limit in map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
            known.append(int(text))
    return min(known, default=0)


def gpu_finding(index: int, properties: Any) -> Finding:
    """What a GPU is and which precisions it is for."""
    capability = (properties.major, properties.minor)
    precisions, advice = "fp32", "no tensor cores: fp16 and bf16 gain nothing here"
    if capability >= (8, 0):
        precisions, advice = "fp32, bf16 and fp16", ""
    elif capability >= (7, 0):
        precisions, advice = "fp32 and fp16", "bf16 is emulated: set train.precision fp16, or auto"
    size = f"sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
    auto = f"train.precision auto takes {automatic(capability)}"
    return Finding(f"GPU {index}", "ok", f"{properties.name}, {size}; {precisions}; {auto}", advice)


def no_gpu_finding() -> Finding:
    """Why there is no GPU: the build of torch, or the driver."""
    if torch.version.cuda is None:
        return Finding("GPU", "absent", "this torch is built without CUDA", "install torch for CUDA from pytorch.org")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return Finding("GPU", "absent", str(error).splitlines()[0].split(". ")[0], "check the driver with nvidia-smi")
    return Finding("GPU", "absent", "torch sees no CUDA device", "check CUDA_VISIBLE_DEVICES and nvidia-smi")
