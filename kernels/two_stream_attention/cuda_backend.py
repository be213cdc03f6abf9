"""Launches of the CUDA C++ kernels of two-stream attention (csrc/), which MAPET_BUILD_CUDA=1 builds.

Beyond the other backends' interface it takes `perm` (B, N): content rows in image order are gathered in the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapet_kernels import _C  # noqa: F401  (loads the operators)
from mapet_kernels.backends import MAX_CUDA_HEAD_SIZE
from mapet_kernels.two_stream_attention.problem import Problem, Streams

DTYPES = (torch.float16, torch.bfloat16)


def forward(
    q: Streams,
    k: Tensor,
    v: Tensor,
    out: Streams,
    lse: Streams,
    problem: Problem,
    perm: Tensor | None = None,
    shared_limit: int = -1,
) -> None:
    """Fill `out` (B, rows, H, D) and `lse` (B, rows, H); shared_limit: bytes of shared memory a block may use."""
    _check(k)
    q, k, v = Streams(_dense_rows(q.content), _dense_rows(q.query)), _dense_rows(k), _dense_rows(v)
    torch.ops.mapet_kernels.cuda_two_stream_forward(
        *_both(q), k, v, *_both(out), *_both(lse), *_options(problem, perm), shared_limit
    )


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
    shared_limit: int = -1,
) -> None:
    """Fill `dq`, `dk` and `dv` (last stride 1); `out` and `lse` are those of `forward`."""
    _check(k)
    q, k, v = Streams(_dense_rows(q.content), _dense_rows(q.query)), _dense_rows(k), _dense_rows(v)
    # Of every row, from the first kernel for the second: log-sum-exp in base 2, and rowsum(dO * O).
    workspace = lse.query.new_empty(2, k.shape[0], k.shape[2], problem.tokens + 2 * problem.targets)
    torch.ops.mapet_kernels.cuda_two_stream_backward(
        *_both(d_out), *_both(q), k, v, *_both(out), *_both(lse), *_both(dq), dk, dv, workspace,
        *_options(problem, perm), shared_limit,
    )  # fmt: skip


def _check(k: Tensor) -> None:
    # Autocast changes the dtype after the backend was chosen, so it is checked here again.
    if k.dtype not in DTYPES:
        raise ValueError(f"backend 'cuda' takes float16 and bfloat16, got {k.dtype}")
    if not 1 <= k.shape[-1] <= MAX_CUDA_HEAD_SIZE:
        raise ValueError(f"backend 'cuda' takes head sizes 1 to {MAX_CUDA_HEAD_SIZE}, got {k.shape[-1]}")


def _both(streams: Streams) -> tuple[Tensor | None, Tensor]:
    return streams.content, streams.query


def _dense_rows(x: Tensor | None) -> Tensor | None:
    """x itself if its last dimension is contiguous, as the kernels need it, otherwise a copy."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _options(problem: Problem, perm: Tensor | None) -> tuple:
    """(tokens, cut, cuts, perm, mask_tokens, scale)."""
    per_image = isinstance(problem.cut, Tensor)
    cuts = problem.cut.contiguous() if per_image else None
    perm = None if perm is None else perm.contiguous()
    return problem.tokens, -1 if per_image else problem.cut, cuts, perm, problem.mask_tokens, problem.scale
