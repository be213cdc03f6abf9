"""Launches of the Triton kernels of prefix-suffix attention, on a GPU or, with TRITON_INTERPRET=1, on CPU tensors.

Unlike the other backends it is given the shifts and no mask: no tensor of rows x keys exists.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mapet_kernels import attention_launch, launch
from mapet_kernels.attention_launch import check, dense_rows, strides
from mapet_kernels.prefix_suffix_attention import kernel
from mapet_kernels.prefix_suffix_attention.problem import Problem
from mapet_kernels.triton_launch import Launch, target

LIST_ROWS = 1024
"""Rows whose shifts `row_tile_list_kernel` holds at a time."""


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem) -> None:
    """Fill `out` (B, R, H, D) and `lse` (B, R, H), both contiguous."""
    check(q, out, lse)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    forward_launch(q, k, v, out, lse, problem, target(q.device)).run(q.device)


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    problem: Problem,
) -> None:
    """Fill the contiguous `dq`, `dk` and `dv`; `out` and `lse` are those of `forward`."""
    check(q, d_out, out, lse, dq, dk, dv)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    for part in backward_launches(d_out, q, k, v, out, lse, dq, dk, dv, problem, target(q.device)):
        part.run(q.device)


def forward_launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem, target: launch.Target
) -> Launch:
    """The launch of `forward` for a target."""
    config = launch.attention_forward(q.shape[-1], q.dtype, target)
    batch, rows, heads, _ = q.shape
    tiles = triton.cdiv(rows, config.rows)
    cuts, *sizes = _sizes(problem, q, k)
    scale = float(problem.scale)
    return Launch(
        kernel.forward_kernel,
        tiles * batch * heads,
        (
            *(q, k, v, out, lse, problem.shift, cuts),
            *(*strides(q, k, v), *_shift_strides(problem), scale, *sizes, heads, tiles),
        ),
        attention_launch.constants(config, q, k, v, out),
    )


def backward_launches(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    problem: Problem,
    target: launch.Target,
) -> tuple[Launch, Launch, Launch]:
    """The launches of `backward`, in order: dQ; which rows see which keys, tile by tile; dK and dV."""
    batch, rows, heads, size = q.shape
    shift = problem.shift
    cuts, *sizes = _sizes(problem, q, k)
    scale = float(problem.scale)
    config = launch.attention_query_gradient(size, q.dtype, target)
    key_config = launch.attention_key_gradient(size, q.dtype, target)
    # Of every row, from the first kernel for the last: log-sum-exp in base 2, and rowsum(dO * O).
    tiles = triton.cdiv(rows, config.rows)
    statistics = lse.new_empty(batch, heads, tiles * config.rows + key_config.rows, 2)
    query_gradient = Launch(
        kernel.query_gradient_kernel,
        tiles * batch * heads,
        (
            *(q, k, v, out, d_out, lse, statistics, dq, shift, cuts),
            *(*strides(q, k, v), *_shift_strides(problem), scale, *sizes, heads, tiles),
        ),
        attention_launch.constants(config, q, k, v, out, d_out, dq) | {"TAIL": key_config.rows},
    )
    tiles, row_tiles = triton.cdiv(k.shape[1], key_config.keys), triton.cdiv(rows, key_config.rows)
    sets = batch if problem.per_image else 1
    lists = torch.empty(sets, tiles, 2 * row_tiles + 3, dtype=torch.int32, device=q.device)
    row_tile_list = Launch(
        kernel.row_tile_list_kernel,
        sets * tiles,
        (shift, cuts, lists, *_shift_strides(problem), *sizes, row_tiles, tiles),
        {
            "BM": key_config.rows,
            "BN": key_config.keys,
            "CHUNK": LIST_ROWS // key_config.rows,
            "num_warps": key_config.warps,
            "num_stages": 1,
        },
    )
    key_gradient = Launch(
        kernel.key_gradient_kernel,
        tiles * batch * heads,
        (
            *(q, k, v, d_out, statistics, dk, dv, lists, shift, cuts),
            *(*strides(q, k, v), *_shift_strides(problem), lists.stride(0) if problem.per_image else 0),
            *(scale, *sizes, heads, row_tiles, tiles, statistics.shape[2]),
        ),
        attention_launch.constants(key_config, q, k, v, d_out, dk, dv),
    )
    return query_gradient, row_tile_list, key_gradient


def _shift_strides(problem: Problem) -> tuple[int, int]:
    """(image, row) strides of the shifts."""
    return problem.shift.stride(0) if problem.shift.dim() == 2 else 0, problem.shift.stride(-1)


def _sizes(problem: Problem, q: Tensor, k: Tensor) -> tuple[Tensor | None, int, int, int, int]:
    """(cuts, cut, R, C, S); the kernels do not read the cut where there is one per image."""
    cuts = problem.cut.contiguous() if isinstance(problem.cut, Tensor) else None
    cut = problem.cut if cuts is None else 0
    return cuts, cut, q.shape[1], k.shape[1] - problem.suffix_keys, problem.suffix_keys
