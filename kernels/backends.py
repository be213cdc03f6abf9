"""Which implementation of an op runs: a pure choice by name, device, dtype and what is installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mapet_kernels.flash_providers import constant_in_graphs, reason_against_flash

ATTENTION_BACKENDS = ("reference", "sdpa")
"""Backends of every attention op."""

PREFIX_SUFFIX_BACKENDS = (*ATTENTION_BACKENDS, "triton")
TWO_STREAM_BACKENDS = (*ATTENTION_BACKENDS, "matmul", "triton", "flash", "cuda")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton kernels run in Python on CPU tensors: as the process started, since kernels are made at import."""

MAX_TRITON_HEAD_SIZE = MAX_CUDA_HEAD_SIZE = 128


@dataclass(frozen=True)
class Winner:
    """The faster of Triton's attention kernels and those in CUDA C++, and the record that shows it."""

    backend: str
    record: str
    """A file of bench/results/."""


RECORDED_WINNERS: dict[tuple[int, int], Winner] = {}
"""By compute capability of the GPU that the record was made on."""

CPU_RECORD = "kernels_tiny_bf16_cpu_20261128T074425.json"
"""Two-stream attention in bfloat16 on a CPU without AMX: matmul beside sdpa. That of 20261126T161159 has AMX and says
the same."""

HOW_TO_BUILD_CUDA = "MAPET_BUILD_CUDA=1 pip install --no-build-isolation --no-deps ."
"""In a checkout, with nvcc on PATH, and torch, setuptools and wheel installed."""


def available_backends(device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> dict[str, str | None]:
    """Attention backends by name, each with None where it runs on `device` (in `dtype`) or else the reason against."""
    device = torch.device(device)
    return {name: reason_against(name, device, dtype) for name in TWO_STREAM_BACKENDS}


def reason_against(name: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why an attention backend does not run on this device (in this dtype), or None."""
    if name == "triton":
        return reason_against_triton(device, dtype)
    if name == "flash":
        return reason_against_flash(device, dtype)
    if name == "cuda":
        return reason_against_cuda(device, dtype)
    if name == "sdpa" and device.type not in ("cpu", "cuda"):
        return f"needs a CPU or CUDA device, not {device.type}"
    return None


def reason_against_rocm() -> str | None:
    """Why our own kernels do not run with a torch that is built for AMD GPUs, or None."""
    version = torch.version.hip
    return None if version is None else f"AMD GPUs are not supported yet, and this torch is built for ROCm {version}"


@functools.cache
def _once(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), called once: for what no process sees change, and a call of an op need not ask again.

    A function that a test puts in another's place is asked anew.
    """
    return function(*arguments)


def _gpu(device: torch.device) -> tuple[str, tuple[int, int]]:
    """Name and compute capability of a CUDA device."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _once(torch.cuda.get_device_name, index), _once(torch.cuda.get_device_capability, index)


@constant_in_graphs
def reason_against_triton(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why Triton kernels do not run on this device (in this dtype), or None."""
    if _once(importlib.util.find_spec, "triton") is None:
        return "the package triton is not installed (pip install triton, on Linux)"
    if INTERPRETED:
        if dtype == torch.bfloat16:
            return "TRITON_INTERPRET=1 computes bfloat16 wrongly; use float16 or float32"
        return None if device.type == "cpu" else f"TRITON_INTERPRET=1 takes CPU tensors, not {device.type}"
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type} (or TRITON_INTERPRET=1 before Python starts, for tests)"
    if (reason := reason_against_rocm()) is not None:
        return reason
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    name, (major, minor) = _gpu(device)
    if major < 8:
        return f"needs compute capability 8.0 or newer, {name} has {major}.{minor}"
    return "takes float16, bfloat16 and float32, not float64" if dtype == torch.float64 else None


@constant_in_graphs
def reason_against_cuda(device: torch.device, dtype: torch.dtype | None, products: bool = True) -> str | None:
    """Why the CUDA C++ kernels do not run on this device (in this dtype), or None.

    products: of an op that multiplies matrices, on tensor cores; others take any floating-point dtype.
    """
    if device.type == "cuda" and (reason := reason_against_rocm()) is not None:
        return reason
    if _once(importlib.util.find_spec, "mapet_kernels._C") is None:
        return f"the CUDA C++ kernels are not built ({HOW_TO_BUILD_CUDA}, in a checkout, with nvcc on PATH)"
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    name, capability = _gpu(device)
    if capability < (7, 0):
        return f"needs compute capability 7.0 or newer, {name} has {capability[0]}.{capability[1]}"
    if products and dtype not in (None, torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if products and dtype == torch.bfloat16 and capability < (8, 0):
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
    """The backend for a request: "auto" takes Triton's kernels or those in CUDA C++ (`choose_kernels`), where neither
    runs torch's own attention (two streams in bfloat16 on a CPU: "matmul"), else the reference.

    Args:
        among: the op's backends.
        size: head size, for ops that have one.

    Raises:
        ValueError: the op has no such backend, or it cannot run on the device in the dtype; the text says why.
    """
    device = torch.device(device)
    if requested == "auto":
        return explain_auto(device, dtype, among, size)[0]
    if requested not in among:
        raise ValueError(f"unknown backend {requested!r}; backends are auto, {', '.join(among)}")
    if (reason := reason_against(requested, device, dtype)) is not None:
        raise ValueError(f"backend {requested!r} cannot run here: {reason}")
    return requested


def explain_auto(
    device: torch.device,
    dtype: torch.dtype | None = None,
    among: Sequence[str] = TWO_STREAM_BACKENDS,
    size: int | None = None,
) -> tuple[str, str]:
    """The attention backend that "auto" takes on a device, and why."""
    otherwise = "sdpa" if "sdpa" in among and device.type in ("cpu", "cuda") else "reference"
    if device.type == "cpu" and dtype == torch.bfloat16 and "matmul" in among:
        return "matmul", f"the kernels are for CUDA devices; in bfloat16 the faster on a CPU by {CPU_RECORD}"
    if device.type != "cuda":
        # The interpreter is for tests: on CPU tensors Triton has to be asked for.
        return otherwise, "the kernels are for CUDA devices"
    reasons = {}
    if "triton" in among:
        reasons["triton"] = _too_large(size, MAX_TRITON_HEAD_SIZE) or reason_against_triton(device, dtype)
    if "cuda" in among:
        reasons["cuda"] = _too_large(size, MAX_CUDA_HEAD_SIZE) or reason_against_cuda(device, dtype)
    return choose_kernels(reasons, _capability(device), otherwise, RECORDED_WINNERS)


def choose_kernels(
    reasons: Mapping[str, str | None],
    capability: tuple[int, int],
    otherwise: str,
    winners: Mapping[tuple[int, int], Winner],
) -> tuple[str, str]:
    """Which kernels "auto" takes, and why: those that run; of two the faster by record, without a record Triton's.

    Args:
        reasons: by name of the kernels, "triton" first, None where they run or else why they do not.
        otherwise: what is taken where none of them runs.
        winners: by compute capability.
    """
    running = [name for name, reason in reasons.items() if reason is None]
    others = "; ".join(f"{name} does not run: {reason}" for name, reason in reasons.items() if reason is not None)
    if len(running) < 2:
        return running[0] if running else otherwise, others or "there are no other kernels"
    if (winner := winners.get(capability)) is not None:
        return winner.backend, f"the faster of {' and '.join(running)} by {winner.record}"
    return running[0], f"no record compares it with {running[1]} on compute capability {capability[0]}.{capability[1]}"


def _too_large(size: int | None, most: int) -> str | None:
    return None if size is None or size <= most else f"takes head sizes up to {most}, not {size}"


@constant_in_graphs
def _capability(device: torch.device) -> tuple[int, int]:
    return _gpu(device)[1] if torch.cuda.is_available() else (0, 0)


def choose_listed_backend(
    requested: str,
    listed: Sequence[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    products: bool = True,
) -> str:
    """The backend for a request, of an op whose backends but "triton" and "cuda" run on every device.

    "auto" takes "triton" on a CUDA device where it is listed and runs (in `dtype`), else "cuda", else the first.

    Args:
        products: whether the op's CUDA C++ kernels multiply matrices: in float16 whatever the dtype, so that bfloat16
            runs on every GPU with tensor cores, but not float64. Others take any floating-point dtype.

    Raises:
        ValueError: the name is unknown, or the backend cannot run on the device in the dtype; the text says why.
    """
    device = torch.device(device)
    if requested == "auto":
        # The interpreter is for tests: on CPU tensors Triton has to be asked for.
        fast = ("triton", "cuda") if device.type == "cuda" else ()
        running = (b for b in fast if b in listed and reason_against_listed(b, device, dtype, products) is None)
        return next(running, listed[0])
    if requested not in listed:
        raise ValueError(f"unknown backend {requested!r}; backends are auto, {', '.join(listed)}")
    if (reason := reason_against_listed(requested, device, dtype, products)) is not None:
        raise ValueError(f"backend {requested!r} cannot run here: {reason}")
    return requested


def reason_against_listed(
    name: str, device: torch.device | str, dtype: torch.dtype | None = None, products: bool = True
) -> str | None:
    """Why a backend of an op as in `choose_listed_backend` does not run on this device (in this dtype), or None."""
    device = torch.device(device)
    if name == "triton":
        return reason_against_triton(device, dtype)
    if name != "cuda":
        return None
    reason = reason_against_cuda(device, None, products=False)
    if reason is None and products and dtype == torch.float64:
        return "takes float16, bfloat16 and float32, not float64"
    return reason
