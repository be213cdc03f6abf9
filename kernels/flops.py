"""FLOP of the attention operators, for torch.utils.flop_counter: importing this file registers them.

Visible pairs are counted, by the registry's cost. Those of `prefix_suffix_attention` follow from values, so that every
pair of a row and a key counts there.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from mapet_kernels.registry import REGISTRY, TwoStreamShape

BACKWARD_PRODUCTS = 2.5
"""Products of the backward pass to those of the forward pass: five to two, as the scores are formed again."""

ops = torch.ops.mapet_kernels


def packed(q, kv, targets: int, mask_tokens: bool) -> int:
    """FLOP forward of shapes q (rows, H, D) and kv (B, content rows, 2, H, D)."""
    batch, rows, _, heads, size = kv
    return two_stream(q[0] != batch * targets, targets, (batch, rows, heads, size), mask_tokens)


def two_stream(with_content: bool, targets: int, k, mask_tokens: bool) -> int:
    """FLOP forward of keys (B, content rows, H, D); of several cuts, as if all were the least."""
    batch, rows, heads, size = k
    tokens = rows - targets if mask_tokens else rows
    shape = TwoStreamShape(tokens, tokens - targets, batch, heads, size, mask_tokens, with_content=with_content)
    return REGISTRY["two_stream_attention"].cost(shape, torch.float32)[0]


def prefix_suffix(q, k) -> int:
    """FLOP forward of shapes q (B, rows, H, D) and k (B, keys, H, D)."""
    batch, rows, heads, size = q
    return 4 * batch * rows * k[1] * heads * size


FORMULAS = {
    ops.two_stream_attention_packed: lambda a: packed(a[0], a[1], a[3], a[4]),
    ops.two_stream_attention_packed_backward: lambda a: BACKWARD_PRODUCTS * packed(a[1], a[2], a[6], a[7]),
    ops.two_stream_attention: lambda a: two_stream(a[0] is not None, a[1][1], a[2], a[7]),
    ops.two_stream_attention_backward: lambda a: BACKWARD_PRODUCTS * two_stream(a[2] is not None, a[3][1], a[4], a[13]),
    ops.prefix_suffix_attention: lambda a: prefix_suffix(a[0], a[1]),
    ops.prefix_suffix_attention_backward: lambda a: BACKWARD_PRODUCTS * prefix_suffix(a[1], a[2]),
}
"""Of an operator's arguments, tensors as shapes."""

for _op, _formula in FORMULAS.items():
    register_flop_formula(_op)(lambda *arguments, _formula=_formula, **_: _formula(arguments))
