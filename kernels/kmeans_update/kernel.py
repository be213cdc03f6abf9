"""Sums of the rows of every cluster, in an order that the row numbers alone decide: no atomics.

Rows are visited in the stable order by cluster: `order` (n,) holds row numbers, `first` (K + 1,) where each cluster
starts in it. A cluster is cut into pieces of PIECE rows. Piece 0 is summed by the program that writes the cluster's
sum; the others, of long clusters only, by programs of their own into `partial`. A cluster from position a on has its
piece j >= 1 in slot a // PIECE + j - 1, which no other piece has, as pieces before the last are full.

Names: K clusters; D features; BD features of a program; R rows of a step. i_ index, m_ mask, b_ block in registers.
"""

import triton
import triton.language as tl


@triton.jit
def _sum_of_rows(x, order, start, stop, d, m_d, s_xn, s_xd, R: tl.constexpr, BD: tl.constexpr):
    """Float64 sum (BD,) of the rows at positions [start, stop) of the order."""
    b_sum = tl.zeros([R, BD], tl.float64)
    for o in range(start, stop, R):
        i = o + tl.arange(0, R)
        m = i < stop
        row = tl.load(order + i, mask=m, other=0)
        p = x + row[:, None] * s_xn + d[None, :] * s_xd
        b_sum += tl.load(p, mask=m[:, None] & m_d[None, :], other=0.0).to(tl.float64)
    return tl.sum(b_sum, 0)


@triton.jit(do_not_specialize=["blocks", "K"])
def partial_sums_kernel(
    x, order, ordered_ids, first, partial, s_xn, s_xd, D, blocks, K,
    PIECE: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program a slot and BD features: the piece after the first of whatever cluster owns the slot, if one does."""
    i_slot = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    # A slot's owner, if there is one, holds this position. Ids that nobody checked stay within `first` all the same.
    i_cluster = tl.minimum(tl.maximum(tl.load(ordered_ids + (i_slot + 1) * PIECE - 1), 0), K - 1)
    begin = tl.load(first + i_cluster).to(tl.int32)
    end = tl.load(first + i_cluster + 1).to(tl.int32)
    start = begin + (i_slot - begin // PIECE + 1) * PIECE
    if start < end:
        stop = tl.minimum(start + PIECE, end)
        b = _sum_of_rows(x, order, start, stop, d, d < D, s_xn, s_xd, R, BD)
        tl.store(partial + i_slot.to(tl.int64) * D + d, b, mask=d < D)


@triton.jit(do_not_specialize=["blocks"])
def sums_kernel(
    x, order, first, partial, sums, s_xn, s_xd, D, blocks,
    ADD: tl.constexpr, PIECE: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program a cluster and BD features: the sum of its pieces in order, with ADD on top of what `sums` holds."""
    i_cluster = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    m = d < D
    begin = tl.load(first + i_cluster).to(tl.int32)
    end = tl.load(first + i_cluster + 1).to(tl.int32)
    b_sum = _sum_of_rows(x, order, begin, tl.minimum(begin + PIECE, end), d, m, s_xn, s_xd, R, BD)
    p_partial = partial + (begin // PIECE).to(tl.int64) * D + d
    for _ in range(tl.cdiv(end - begin, PIECE) - 1):
        b_sum += tl.load(p_partial, mask=m, other=0.0)
        p_partial += D
    p_sums = sums + i_cluster * D + d
    if ADD:
        b_sum += tl.load(p_sums, mask=m, other=0.0).to(tl.float64)
    tl.store(p_sums, b_sum.to(sums.dtype.element_ty), mask=m)
