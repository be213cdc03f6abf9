"""Two-stream attention in plain torch: dense masks, any dtype up to float64, nothing clever.

For each image, with keys A, B, M and the visibility of visibility.two_stream_visibility:

    S = scale * Q K^T       P = softmax(S over visible keys)       O = P V        (a row that sees no key: O = 0)
    dV = P^T dO       dS = P * (dO V^T - rowsum(dO * O))       dQ = scale * dS K       dK = scale * dS^T Q
"""

from __future__ import annotations

from torch import Tensor

from mapet_kernels.prefix_suffix_attention.reference import masked_attention, masked_attention_backward
from mapet_kernels.two_stream_attention.problem import Problem, Streams
from mapet_kernels.visibility import two_stream_visibility


def forward(q: Streams, k: Tensor, v: Tensor, out: Streams, lse: Streams, problem: Problem) -> None:
    """Fill `out` (B, rows, H, D) and `lse` (B, rows, H); content rows in permuted order."""
    for rows, visible, o, statistics in zip(*_streams(q, k, problem, out, lse), strict=True):
        result, result_lse = masked_attention(rows, k, v, visible, problem.scale)
        o.copy_(result)
        statistics.copy_(result_lse)


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
) -> None:
    """Fill `dq` (content, query), `dk` and `dv`; `out` and `lse` are those of `forward`."""
    dk.zero_()
    dv.zero_()
    for rows, visible, o, statistics, d_o, d_rows in zip(*_streams(q, k, problem, out, lse, d_out, dq), strict=True):
        dq_rows, dk_rows, dv_rows = masked_attention_backward(d_o, rows, k, v, visible, problem.scale, o, statistics)
        d_rows.copy_(dq_rows)
        dk += dk_rows
        dv += dv_rows


def _streams(q: Streams, k: Tensor, problem: Problem, *others: Streams) -> list[list[Tensor]]:
    """Columns (rows, mask, others...) over the streams there are."""
    content, query = two_stream_visibility(
        problem.tokens, problem.cut, targets=problem.targets, mask_tokens=problem.mask_tokens, device=k.device
    )
    columns = [[q.content, q.query], [content, query], *([s.content, s.query] for s in others)]
    return columns if q.content is not None else [column[1:] for column in columns]
