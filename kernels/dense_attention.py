"""Attention of a rectangle of rows and keys under one mask that the whole batch shares, forward and backward.

The building block of the `sdpa` backends: torch's own fused kernels with their log-sum-exp, so that the backward pass
recomputes nothing but what those kernels recompute; plain matrix products where no fused kernel takes the input.

Formulas, for one head, with S = scale * Q K^T + bias and P = softmax(S):

    O = P V       dV = P^T dO       dS = P * (dO V^T - rowsum(dO * O))       dQ = scale * dS K       dK = scale * dS^T Q
"""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten

LSE_ALIGNMENT = 32  # rows of log-sum-exp that torch's memory-efficient CUDA kernel stores at a time


def attention_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (R, K): 0 where visible, -inf elsewhere. A row that sees nothing is opened: its caller zeroes it.

    The rows are padded to a stride that is a multiple of 8, which the CUDA kernels ask for.
    """
    rows, keys = visible.shape
    visible = visible | ~visible.any(dim=1, keepdim=True)
    bias = torch.zeros(rows, -(-keys // 8) * 8, dtype=dtype, device=visible.device)[:, :keys]
    return bias.masked_fill_(~visible, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * q k^T + bias) v, and the natural log-sum-exp of its scores.

    Args:
        q: (B, H, R, D).
        k, v: (B, H, K, D).
        bias: (R, K) in q's dtype, or None.

    Returns:
        out (B, H, R, D) in q's dtype; log-sum-exp (B, H, R), fp32 or, for float64, float64.
    """
    kind = _fused_kernel(q)
    if kind == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    if kind == "cuda":
        out, lse, _, _ = aten._scaled_dot_product_efficient_attention(
            q, k, v, _expand(bias, q, k), True, 0.0, False, scale=scale
        )
        return out, lse[..., : q.shape[2]]
    scores = _scores(q, k, bias, scale)
    return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


def attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `attend` from those of its output and what it returned; on a CPU at least in fp32."""
    kind = _fused_kernel(q)
    if kind == "cpu":
        # The CPU kernel's backward pass takes twice as long in fp16 and bf16 as in fp32.
        tensors = (_at_least_fp32(x) for x in (d_out, q, k, v, out))
        bias = None if bias is None else _at_least_fp32(bias)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, lse, 0.0, False, attn_mask=bias, scale=scale
        )
    if kind == "cuda":
        rows = q.shape[2]
        aligned = torch.nn.functional.pad(lse, (0, -rows % LSE_ALIGNMENT)).contiguous()
        no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            d_out,
            q,
            k,
            v,
            _expand(bias, q, k),
            out,
            aligned,
            no_dropout,
            no_dropout,
            0.0,
            [True, True, True, False],
            False,
            scale=scale,
        )
        return dq, dk, dv
    p = (_scores(q, k, bias, scale) - lse.unsqueeze(-1)).exp()
    dv = p.to(v.dtype).transpose(-1, -2) @ d_out
    dp = (d_out @ v.transpose(-1, -2)).to(p.dtype)
    delta = (d_out.to(p.dtype) * out.to(p.dtype)).sum(-1, keepdim=True)
    ds = (p * (dp - delta) * scale).to(q.dtype)
    return ds @ k, ds.transpose(-1, -2) @ q, dv


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _fused_kernel(q: Tensor) -> str | None:
    if q.shape[-2] == 0:
        return None
    if q.device.type == "cpu":
        return "cpu"
    # On AMD GPUs (torch.version.hip) nothing has shown that the log-sum-exps of its kernel are laid out the same way.
    if q.device.type == "cuda" and torch.version.hip is None and q.dtype != torch.float64 and q.shape[-1] % 8 == 0:
        return "cuda"
    return None


def _expand(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """The bias for every image and head, without a copy; the CUDA kernel wants one even where it is 0."""
    if bias is None:
        bias = attention_bias(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device), q.dtype)
    return bias.expand(q.shape[0], q.shape[1], -1, -1)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    return scores if bias is None else scores + bias
