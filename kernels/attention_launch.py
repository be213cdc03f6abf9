"""What the launches of the attention kernels share: checks, alignment, strides and constants."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from mapet_kernels import launch
from mapet_kernels.backends import INTERPRETED, MAX_TRITON_HEAD_SIZE
from mapet_kernels.launch import LaunchConfig


def check(query: Tensor, *results: Tensor | None) -> None:
    """Raise ValueError unless the kernels take the head size and dtype of `query` and find the results contiguous."""
    size = query.shape[-1]
    if not 1 <= size <= MAX_TRITON_HEAD_SIZE:
        raise ValueError(f"backend 'triton' takes head sizes 1 to {MAX_TRITON_HEAD_SIZE}, got {size}")
    # Autocast changes the dtype after the backend was chosen, so it is checked here again.
    if INTERPRETED and query.dtype == torch.bfloat16:
        raise ValueError("backend 'triton' under TRITON_INTERPRET=1 is wrong in bfloat16: use float16 or float32")
    if not INTERPRETED and query.dtype == torch.float64:
        raise ValueError("backend 'triton' takes float16, bfloat16 and float32 on a GPU, got float64")
    if not all(tensor is None or tensor.is_contiguous() for tensor in results):
        raise ValueError("backend 'triton' reads and writes outputs, statistics and their gradients contiguous")


def dense_rows(x: Tensor | None) -> Tensor | None:
    """x itself if its last dimension is contiguous and row strides fit 32 bits, as the kernels need it, else a copy."""
    return x if x is None or (x.stride(-1) == 1 and x.stride(1) < 2**31) else x.contiguous()


def rows_are_aligned(x: Tensor) -> bool:
    """Whether every row of x (..., D) starts at a multiple of 16 bytes, so that it is moved 16 bytes at a time."""
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """(image, row, head) strides of each."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def gathering_stages(config: LaunchConfig) -> int:
    """Stages of a loop that loads what tells it which rows to load: as many of both on their way as without that.

    Triton shares all stages but two out among loads that wait for each other.
    """
    return 2 * config.stages - 1


def constants(config: LaunchConfig, *tensors: Tensor) -> dict[str, Any]:
    """Constants and options of a kernel that moves rows (..., D) of the tensors, which share D and dtype."""
    x = tensors[0]
    # fp32 products round like the caller's own matrix products do: IEEE unless TF32 was asked for.
    tf32 = x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "D": x.shape[-1],
        "BD": launch.padded_size(x.shape[-1]),
        "BM": config.rows,
        "BN": config.keys,
        "ALIGNED": all(rows_are_aligned(x) for x in tensors),
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 else "ieee",
        "num_warps": config.warps,
        "num_stages": config.stages,
        **({} if config.registers is None else {"maxnreg": config.registers}),
    }
