"""Launches of the Triton kernels of two-stream attention, on a GPU or, with TRITON_INTERPRET=1, on CPU tensors.

Beyond the other backends' interface it takes `perm` (B, N): content rows in image order are gathered in the kernels.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mapet_kernels import launch
from mapet_kernels.backends import INTERPRETED, MAX_TRITON_HEAD_SIZE
from mapet_kernels.launch import LaunchConfig
from mapet_kernels.two_stream_attention import kernel
from mapet_kernels.two_stream_attention.problem import Problem, Streams


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, its arguments in order, and its constants and compiler options by name."""

    kernel: Any
    programs: int
    arguments: tuple[Tensor | int | None, ...]
    constants: dict[str, Any]

    def run(self, device: torch.device) -> None:
        """Launch on `device`, which need not be the current one."""
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[(self.programs,)](*self.arguments, **self.constants)


def forward(
    q: Streams, k: Tensor, v: Tensor, out: Streams, lse: Streams, problem: Problem, perm: Tensor | None = None
) -> None:
    """Fill `out` (B, rows, H, D) and `lse` (B, rows, H), contiguous streams each."""
    _check(q.query, out, lse)
    q, k, v = Streams(_dense_rows(q.content), _dense_rows(q.query)), _dense_rows(k), _dense_rows(v)
    forward_launch(q, k, v, out, lse, problem, perm, _architecture(k.device)).run(k.device)


def backward(
    d_out: Streams,
    q: Streams,
    k: Tensor,
    v: Tensor,
    out: Streams,
    lse: Streams,
    dq: Streams,
    dk: Tensor,
    dv: Tensor,
    problem: Problem,
    perm: Tensor | None = None,
) -> None:
    """Fill `dq` (contiguous streams), `dk` and `dv` (last stride 1); `out` and `lse` are those of `forward`."""
    _check(q.query, d_out, out, lse, dq)
    q, k, v = Streams(_dense_rows(q.content), _dense_rows(q.query)), _dense_rows(k), _dense_rows(v)
    architecture = _architecture(k.device)
    for part in backward_launches(d_out, q, k, v, out, lse, dq, dk, dv, problem, perm, architecture):
        part.run(k.device)


def forward_launch(
    q: Streams,
    k: Tensor,
    v: Tensor,
    out: Streams,
    lse: Streams,
    problem: Problem,
    perm: Tensor | None,
    architecture: int,
) -> Launch:
    """The launch of `forward` for an architecture of `launch.ARCHITECTURES`."""
    config = launch.two_stream_forward(k.shape[-1], k.dtype, architecture)
    tiles, first_tiles = _row_tiles(problem, q.content is not None, config.rows)
    return Launch(
        kernel.forward_kernel,
        tiles * k.shape[0] * k.shape[2],
        (
            *(*_both(q), k, v, *_both(out), *_both(lse), *_per_image(problem, perm)),
            *(*_strides(*_both(q), k, v), *_sizes(problem, k), first_tiles, tiles),
        ),
        _constants(problem, config, q.content is not None, k, v, *_both(q), *_both(out)),
    )


def backward_launches(
    d_out: Streams,
    q: Streams,
    k: Tensor,
    v: Tensor,
    out: Streams,
    lse: Streams,
    dq: Streams,
    dk: Tensor,
    dv: Tensor,
    problem: Problem,
    perm: Tensor | None,
    architecture: int,
) -> tuple[Launch, Launch]:
    """The launches of `backward`, in order: dQ, then dK and dV."""
    with_content = q.content is not None
    # Of every row, from the first kernel for the second: log-sum-exp in base 2, and rowsum(dO * O).
    statistics = lse.query.new_empty(2, k.shape[0], k.shape[2], problem.tokens + 2 * problem.targets)
    config = launch.two_stream_query_gradient(k.shape[-1], k.dtype, architecture)
    tiles, first_tiles = _row_tiles(problem, with_content, config.rows)
    query_gradient = Launch(
        kernel.query_gradient_kernel,
        tiles * k.shape[0] * k.shape[2],
        (
            *(*_both(q), k, v, *_both(out), *_both(d_out), *_both(lse), *statistics, *_both(dq)),
            *(*_per_image(problem, perm), *_strides(*_both(q), k, v), *_sizes(problem, k), first_tiles, tiles),
        ),
        _constants(problem, config, with_content, k, v, *_both(q), *_both(out), *_both(d_out), *_both(dq)),
    )
    config = launch.two_stream_key_gradient(k.shape[-1], k.dtype, architecture)
    tiles = triton.cdiv(problem.content_rows, config.keys)
    key_gradient = Launch(
        kernel.key_gradient_kernel,
        tiles * k.shape[0] * k.shape[2],
        (
            *(*_both(q), k, v, *_both(d_out), *statistics, dk, dv, *_per_image(problem, perm)),
            *(*_strides(*_both(q), k, v, dk, dv), *_sizes(problem, k), tiles),
        ),
        _constants(problem, config, with_content, k, v, *_both(q), *_both(d_out), dk, dv),
    )
    return query_gradient, key_gradient


def rows_are_aligned(x: Tensor) -> bool:
    """Whether every row of x (..., D) starts at a multiple of 16 bytes, so that it is moved 16 bytes at a time."""
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])


def _row_tiles(problem: Problem, with_content: bool, rows: int) -> tuple[int, int]:
    """(tiles, first_tiles) of one image and head: row tiles of the forward and dQ kernels, those with s = 0 first."""
    if not with_content:
        return triton.cdiv(problem.targets, rows), 0
    # The grid cannot follow cuts on the device. With mask tokens N rows have s = 0, without c rows.
    most = problem.tokens if problem.mask_tokens or isinstance(problem.cut, Tensor) else problem.cut
    first_tiles = triton.cdiv(most, rows)
    return first_tiles + triton.cdiv(problem.targets, rows // 2), first_tiles


def _check(query: Tensor, *results: Streams) -> None:
    size = query.shape[-1]
    if not 1 <= size <= MAX_TRITON_HEAD_SIZE:
        raise ValueError(f"backend 'triton' takes head sizes 1 to {MAX_TRITON_HEAD_SIZE}, got {size}")
    # Autocast changes the dtype after the backend was chosen, so it is checked here again.
    if INTERPRETED and query.dtype == torch.bfloat16:
        raise ValueError("backend 'triton' under TRITON_INTERPRET=1 is wrong in bfloat16: use float16 or float32")
    if not INTERPRETED and query.dtype == torch.float64:
        raise ValueError("backend 'triton' takes float16, bfloat16 and float32 on a GPU, got float64")
    tensors = [tensor for streams in results for tensor in (streams.content, streams.query) if tensor is not None]
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("backend 'triton' reads and writes outputs, statistics and their gradients contiguous")


def _dense_rows(x: Tensor | None) -> Tensor | None:
    """x itself if its last dimension is contiguous, as the kernels need it, otherwise a copy."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _architecture(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return launch.ARCHITECTURES[0]
    return launch.known_architecture(torch.cuda.get_device_capability(device))


def _both(streams: Streams) -> tuple[Tensor, Tensor]:
    """(content, query); the kernels ignore the first where there is no content stream."""
    return streams.query if streams.content is None else streams.content, streams.query


def _per_image(problem: Problem, perm: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(cuts, perm), contiguous where they are given."""
    cuts = problem.cut.contiguous() if isinstance(problem.cut, Tensor) else None
    return cuts, None if perm is None else perm.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """(image, row, head) strides of each."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _sizes(problem: Problem, k: Tensor) -> tuple[int, int, int, int]:
    """(cut, N, T, heads); the kernels do not read the cut where there is one per image."""
    cut = 0 if isinstance(problem.cut, Tensor) else problem.cut
    return cut, problem.tokens, problem.targets, k.shape[2]


def _constants(
    problem: Problem, config: LaunchConfig, with_content: bool, k: Tensor, *others: Tensor
) -> dict[str, Any]:
    """Constants and options of a kernel that moves the rows of k and others."""
    # fp32 products round like the caller's own matrix products do: IEEE unless TF32 was asked for.
    tf32 = k.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "SCALE": float(problem.scale),
        "D": k.shape[-1],
        "BD": launch.padded_size(k.shape[-1]),
        "BM": config.rows,
        "BN": config.keys,
        "WITH_CONTENT": with_content,
        "MASK_TOKENS": problem.mask_tokens,
        "ALIGNED": all(rows_are_aligned(x) for x in (k, *others)),
        "ACC": tl.float64 if k.dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 else "ieee",
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
