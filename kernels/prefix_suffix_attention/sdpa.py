"""Prefix-suffix attention through torch's fused attention under one mask (R, K) that the whole batch shares.

With one shift or cut per image the images go one by one, each under its own (R, K) mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapet_kernels.dense_attention import attend, attend_backward, attention_bias


def forward(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, R, H, D), k and v (B, K, H, D), visible (R, K) or (B, R, K): out (B, R, H, D), log-sum-exp (B, R, H)."""
    if visible.dim() == 3:
        parts = [forward(q[i : i + 1], k[i : i + 1], v[i : i + 1], visible[i], scale) for i in range(q.shape[0])]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    out, lse = attend(*_heads_first(q, k, v), attention_bias(visible, q.dtype), scale)
    dead = ~visible.any(dim=1)
    out = out.masked_fill(dead.unsqueeze(1), 0)
    return out.transpose(1, 2), lse.transpose(1, 2)


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) from those of the output and from what `forward` returned."""
    if visible.dim() == 3:
        each = [slice(i, i + 1) for i in range(q.shape[0])]
        parts = [backward(d_out[i], q[i], k[i], v[i], visible[i][0], scale, out[i], lse[i]) for i in each]
        return tuple(torch.cat(gradients) for gradients in zip(*parts, strict=True))
    dead = ~visible.any(dim=1)
    d_out = d_out.masked_fill(dead.view(1, -1, 1, 1), 0)
    d_out, q, k, v, out, lse = _heads_first(d_out, q, k, v, out, lse)
    gradients = attend_backward(d_out, q, k, v, attention_bias(visible, q.dtype), scale, out, lse)
    return tuple(gradient.transpose(1, 2).to(q.dtype) for gradient in gradients)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)
