"""Attention with a dense boolean mask in plain torch, any dtype up to float64.

S = scale * Q K^T       P = softmax(S over visible keys)       O = P V        (a row that sees no key: O = 0)
dV = P^T dO       dS = P * (dO V^T - rowsum(dO * O))       dQ = scale * dS K       dK = scale * dS^T Q
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention with a boolean mask (R, K) or (B, R, K): q (B, R, H, D), k and v (B, K, H, D).

    Returns out (B, R, H, D) and its log-sum-exp (B, R, H), -inf in a row that sees no key.
    """
    scores = _masked_scores(q, k, visible, scale)  # (B, H, R, K)
    lse = scores.logsumexp(-1)  # (B, H, R)
    p = _probabilities(scores, lse)
    return torch.einsum("bhrk,bkhd->brhd", p, v.to(p.dtype)).to(q.dtype), lse.transpose(1, 2)


def masked_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `masked_attention`, each in the shape and dtype of its input."""
    p = _probabilities(_masked_scores(q, k, visible, scale), lse.transpose(1, 2))
    d_out, out = d_out.to(p.dtype), out.to(p.dtype)
    dp = torch.einsum("brhd,bkhd->bhrk", d_out, v.to(p.dtype))
    delta = (d_out * out).sum(-1).transpose(1, 2).unsqueeze(-1)  # (B, H, R, 1)
    ds = p * (dp - delta) * scale
    dq = torch.einsum("bhrk,bkhd->brhd", ds, k.to(p.dtype))
    dk = torch.einsum("bhrk,brhd->bkhd", ds, q.to(p.dtype))
    dv = torch.einsum("bhrk,brhd->bkhd", p, d_out)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _masked_scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    work = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("brhd,bkhd->bhrk", q.to(work), k.to(work)) * scale
    return scores.masked_fill(~visible.unsqueeze(-3), float("-inf"))


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    # A row that sees nothing has lse = -inf: exp(-inf - 0) is the wanted 0, exp(-inf - (-inf)) would be NaN.
    return (scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp()
