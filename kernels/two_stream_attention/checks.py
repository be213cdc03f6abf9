"""Checks of what callers give to two-stream attention; every text says what was given and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from mapet_kernels.checks import check_tensors, is_integer
from mapet_kernels.two_stream_attention.problem import Problem


def check(
    q_content: Tensor | None,
    q_query: Tensor,
    k: Tensor,
    v: Tensor,
    cut: int | Tensor,
    perm: Tensor | None,
    mask_tokens: bool,
    scale: float | None,
) -> Problem:
    """The problem these arguments pose, or ValueError / TypeError. See `two_stream_attention` for what is allowed."""
    if q_query.dim() != 4:
        raise ValueError(f"q_query must be (B, T, H, D), got {tuple(q_query.shape)}")
    batch, targets, heads, size = q_query.shape
    if targets < 1:
        raise ValueError("q_query has no rows: two-stream attention needs at least one target")
    if k.dim() != 4 or k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (batch, heads, size):
        raise ValueError(
            f"k and v must both be ({batch}, rows, {heads}, {size}) like q_query {tuple(q_query.shape)}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q_content is not None and q_content.shape != k.shape:
        raise ValueError(f"q_content must have the shape of k {tuple(k.shape)}, got {tuple(q_content.shape)}")
    check_tensors(q_query=q_query, k=k, v=v, **({} if q_content is None else {"q_content": q_content}))
    tokens = k.shape[1] - targets if mask_tokens else k.shape[1]
    _check_cut(cut, batch, tokens, targets, mask_tokens)
    if perm is not None and (perm.shape != (batch, tokens) or not is_integer(perm)):
        raise ValueError(f"perm must be integers (B, N) = ({batch}, {tokens}), got {perm.dtype} {tuple(perm.shape)}")
    return Problem(tokens, targets, cut, mask_tokens, size**-0.5 if scale is None else scale)


def _check_cut(cut: int | Tensor, batch: int, tokens: int, targets: int, mask_tokens: bool) -> None:
    sizes = f"N = {tokens} content tokens {'with' if mask_tokens else 'without'} mask tokens and {targets} query rows"
    if not isinstance(cut, Tensor):
        if not 0 <= cut < tokens or cut + targets != tokens:
            raise ValueError(f"cut must be N - T = {tokens - targets} and in [0, N - 1] for {sizes}, got {cut}")
        return
    if cut.shape != (batch,) or not is_integer(cut):
        raise ValueError(f"cut must be an int or integers (B,) = ({batch},), got {cut.dtype} {tuple(cut.shape)}")
    # Reading values is free on the CPU; on a GPU it would wait for the device, and under tracing there are none.
    if cut.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high, least = int(cut.min()), int(cut.max()), max(0, tokens - targets)
        if low < least or high >= tokens:
            raise ValueError(f"every cut must be in [{least}, {tokens - 1}] for {sizes}, got {low} to {high}")
