"""Which implementation of an op runs: a pure choice by name, device, dtype and what is installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence

import torch

from mapet_kernels.flash_providers import reason_against_flash

ATTENTION_BACKENDS = ("reference", "sdpa")
"""Backends of every attention op."""

PREFIX_SUFFIX_BACKENDS = (*ATTENTION_BACKENDS, "triton")
TWO_STREAM_BACKENDS = (*ATTENTION_BACKENDS, "matmul", "triton", "flash", "cuda")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton kernels run in Python on CPU tensors: as the process started, since kernels are made at import."""

MAX_TRITON_HEAD_SIZE = MAX_CUDA_HEAD_SIZE = 128

HOW_TO_BUILD_CUDA = "MAPET_BUILD_CUDA=1 pip install --no-build-isolation --no-deps ."
"""In a checkout, with nvcc on PATH, and torch, setuptools and wheel installed."""


def available_backends(device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> dict[str, str | None]:
    """Attention backends by name, each with None where it runs on `device` (in `dtype`) or else the reason against."""
    device = torch.device(device)
    reason = None if device.type in ("cpu", "cuda") else f"needs a CPU or CUDA device, not {device.type}"
    return {
        "reference": None,
        "sdpa": reason,
        "matmul": None,
        "triton": reason_against_triton(device, dtype),
        "flash": reason_against_flash(device, dtype),
        "cuda": reason_against_cuda(device, dtype),
    }


@torch.compiler.assume_constant_result
def reason_against_triton(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why Triton kernels do not run on this device (in this dtype), or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton, on Linux)"
    if INTERPRETED:
        if dtype == torch.bfloat16:
            return "TRITON_INTERPRET=1 computes bfloat16 wrongly; use float16 or float32"
        return None if device.type == "cpu" else f"TRITON_INTERPRET=1 takes CPU tensors, not {device.type}"
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type} (or TRITON_INTERPRET=1 before Python starts, for tests)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or newer, {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return "takes float16, bfloat16 and float32, not float64" if dtype == torch.float64 else None


@torch.compiler.assume_constant_result
def reason_against_cuda(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why the CUDA C++ kernels do not run on this device (in this dtype), or None."""
    if importlib.util.find_spec("mapet_kernels._C") is None:
        return f"the CUDA C++ kernels are not built ({HOW_TO_BUILD_CUDA}, in a checkout, with nvcc on PATH)"
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < (7, 0):
        return f"needs compute capability 7.0 or newer, {name} has {capability[0]}.{capability[1]}"
    if dtype not in (None, torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and capability < (8, 0):
        return f"bfloat16 needs compute capability 8.0 or newer, {name} has {capability[0]}.{capability[1]}: float16"
    return _reason_against_cuda_library(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _reason_against_cuda_library(index: int) -> str | None:
    """Why the built library is of no use on this GPU, or None."""
    try:
        importlib.import_module("mapet_kernels._C")
    except ImportError as error:
        return f"the CUDA C++ kernels do not load, build them again for this torch: {error}"
    if torch.ops.mapet_kernels.cuda_built_for(index):
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return f"the CUDA C++ kernels were built for other GPUs: TORCH_CUDA_ARCH_LIST={major}.{minor} {HOW_TO_BUILD_CUDA}"


def choose_backend(
    requested: str,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    among: Sequence[str] = ATTENTION_BACKENDS,
    size: int | None = None,
) -> str:
    """The backend for a request: "auto" takes Triton's kernels where they run, else those in CUDA C++ (V100, T4), else
    torch's own attention, else the reference.

    Args:
        among: the op's backends.
        size: head size, for ops that have one.

    Raises:
        ValueError: the op has no such backend, or it cannot run on the device in the dtype; the text says why.
    """
    device = torch.device(device)
    if requested == "auto":
        return _fastest(device, dtype, among, size)
    if requested not in among:
        raise ValueError(f"unknown backend {requested!r}; backends are auto, {', '.join(among)}")
    if (reason := available_backends(device, dtype)[requested]) is not None:
        raise ValueError(f"backend {requested!r} cannot run here: {reason}")
    return requested


def _fastest(device: torch.device, dtype: torch.dtype | None, among: Sequence[str], size: int | None) -> str:
    fits = size is None or size <= MAX_TRITON_HEAD_SIZE
    # The interpreter is for tests: on CPU tensors Triton has to be asked for.
    if "triton" in among and device.type == "cuda" and fits and reason_against_triton(device, dtype) is None:
        return "triton"
    fits = size is None or size <= MAX_CUDA_HEAD_SIZE
    if "cuda" in among and device.type == "cuda" and fits and reason_against_cuda(device, dtype) is None:
        return "cuda"
    return "sdpa" if "sdpa" in among and device.type in ("cpu", "cuda") else "reference"


def choose_listed_backend(
    requested: str,
    listed: Sequence[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> str:
    """The backend for a request, of an op whose backends but "triton" run on every device.

    "auto" takes "triton" on a CUDA device where it is listed and runs (in `dtype`), else the first.

    Raises:
        ValueError: the name is unknown, or the backend cannot run on the device in the dtype; the text says why.
    """
    device = torch.device(device)
    if requested == "auto":
        on_gpu = "triton" in listed and device.type == "cuda" and reason_against_triton(device, dtype) is None
        return "triton" if on_gpu else listed[0]
    if requested not in listed:
        raise ValueError(f"unknown backend {requested!r}; backends are auto, {', '.join(listed)}")
    reason = reason_against_triton(device, dtype) if requested == "triton" else None
    if reason is not None:
        raise ValueError(f"backend {requested!r} cannot run here: {reason}")
    return requested
