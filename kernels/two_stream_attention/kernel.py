"""Two-stream attention: forward, gradient of the queries, gradient of the keys and values.

With the keys in the order M, A, B a row of shift s sees one window of keys p (visibility.py):

    s <= p < window + s        (0 <= p < window + s without mask tokens)

where `window` counts the keys that a row with s = 0 sees: N, or c without mask tokens. As many rows have s = 0: A, and
M where there are mask tokens. Rows are put in the order x in which s never falls, and neighbours share almost all keys:

    x < window              A, then M: s = 0
    x = window + 2 i        G_i: s = i
    x = window + 2 i + 1    B_i: s = i + 1        (last block, G only: x = i, s = i)

So the keys of any tile of rows are one range, and the rows of any tile of keys are one range, each with masks in the
blocks at its two ends only. With one cut per image `real` targets exist out of `targets`; the rows from x = seeing on
are padding, with results 0 and statistics -inf.

A wrong number moves no access out of its tensor: cuts and permutations are clamped, rows and keys beyond the last read
the last.

Names: N = tokens, T = targets, D head size, BD = D padded to a power of two; BM rows and BN keys of a tile. i_ index,
o_ offset, m_ mask, p_ pointers, b_ block in registers. Outputs, statistics and their gradients are contiguous
(B, rows, H, D) and (B, rows, H) for each stream; q, k, v, dk and dv have any strides, the last one 1. Without content
queries the content stream's arguments are not used.

What happens to tiles in registers is in attention_tiles.py.
"""

import triton
import triton.language as tl

from mapet_kernels.attention_tiles import (
    LOG2_E,
    key_gradient_step,
    load_rows,
    load_statistics,
    mask_scores,
    query_gradient_step,
    row_offset,
    scores,
    softmax_result,
    softmax_step,
    store_rows,
    store_statistics,
)

UNSEEN = tl.constexpr(2**30)
"""The first key of a row that sees none."""


@triton.jit
def _sizes(cuts, cut, i_b, tokens, targets, WITH_CONTENT: tl.constexpr, MASK_TOKENS: tl.constexpr):
    """(c, real, window, seeing) of an image: its cut and targets, keys of a row with s = 0, rows that see anything."""
    if cuts is not None:
        c = tl.load(cuts + i_b).to(tl.int32)
    else:
        c = cut
    c = tl.minimum(tl.maximum(c, tl.maximum(tokens - targets, 0)), tokens)
    real = tokens - c
    window = tokens if MASK_TOKENS else c
    seeing = window + 2 * real if WITH_CONTENT else real
    return c, real, window, seeing


@triton.jit
def _shift(x, window, WITH_CONTENT: tl.constexpr):
    """Shift of the rows x."""
    return tl.maximum(x - window + 1, 0) >> 1 if WITH_CONTENT else x


@triton.jit
def _place(
    x, c, real, window, tokens, targets, perm, i_b,
    PADDED: tl.constexpr, WITH_CONTENT: tl.constexpr, MASK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Row in its stream's memory of each of the rows x, whether it is a query row, and whether it exists.

    PADDED: whether there may be targets that do not exist. A padding mask token stands in for the content of each.
    """
    if WITH_CONTENT:
        u = x - window
        target = u >> 1
        is_query = (u >= 0) & (u & 1 == 0)
        content = tl.where(u >= 0, c + target, tl.where(x < c, x, x + real))
        exists = target < targets
        if PADDED:
            if MASK_TOKENS:
                content = tl.where(target < real, content, tokens + target)
            else:
                exists = exists & (is_query | (target < real))
        if perm is not None:
            m_moved = exists & (content < tokens) & (is_query == 0)
            moved = tl.load(perm + i_b * tokens + content, mask=m_moved, other=0).to(tl.int32)
            content = tl.where(m_moved, tl.minimum(tl.maximum(moved, 0), tokens - 1), content)
        row = tl.where(is_query, target, content)
    else:
        row = x
        is_query = row >= 0
        exists = row < targets
    return row, is_query, exists


@triton.jit
def _row_pointers(content, query, row, s_content, s_query, is_query, WITH_CONTENT: tl.constexpr):
    """Pointers (BM,) to rows of one image and head, given pointers and row strides of its two streams."""
    if WITH_CONTENT:
        p = tl.where(is_query, query, content) + row_offset(row, tl.where(is_query, s_query, s_content))
    else:
        p = query + row_offset(row, s_query)
    return p


@triton.jit
def _key_rows(p, real, tokens, perm, i_b, PADDED: tl.constexpr, MASK_TOKENS: tl.constexpr):
    """Memory rows of keys at positions p, in the order M, A, B and, where PADDED, mask tokens that are not seen."""
    row = p
    if MASK_TOKENS:
        row = p + tl.where(p < real, tokens, -real)
        if PADDED:
            row = tl.where(p < tokens + real, row, p)
    if perm is not None:
        m_moved = row < tokens
        moved = tl.load(perm + i_b * tokens + row, mask=m_moved, other=0).to(tl.int32)
        row = tl.where(m_moved, tl.minimum(tl.maximum(moved, 0), tokens - 1), row)
    return row


@triton.jit
def _keys_of_rows(x0, seeing, window, BM: tl.constexpr, WITH_CONTENT: tl.constexpr, MASK_TOKENS: tl.constexpr):
    """Keys that the rows [x0, x0 + BM) see: (lo, full_lo, full_hi, hi).

    Some row sees each key of [lo, hi), every row those of [full_lo, full_hi), and none a key from `hi` on.
    """
    least = _shift(x0, window, WITH_CONTENT)
    most = _shift(tl.minimum(x0 + BM, seeing) - 1, window, WITH_CONTENT)
    lo = least if MASK_TOKENS else 0
    hi = tl.where(x0 < seeing, window + most, lo)
    return lo, most if MASK_TOKENS else 0, window + least, hi


@triton.jit
def _rows_of_keys(p0, p1, seeing, window, WITH_CONTENT: tl.constexpr, MASK_TOKENS: tl.constexpr):
    """Rows that see the keys [p0, p1): (lo, full_lo, full_hi, hi).

    Each row of [lo, hi) sees some key, those of [full_lo, full_hi) see every key.
    """
    # A row sees key p from the shift p - window + 1 on and, where there are mask tokens, up to the shift p.
    if WITH_CONTENT:
        lo = tl.where(p0 < window, 0, 2 * p0 - window + 1)
        full_lo = tl.where(p1 <= window, 0, 2 * p1 - window - 1)
        hi, full_hi = window + 2 * p1 - 1, window + 2 * p0 + 1
    else:
        lo, full_lo = tl.maximum(p0 - window + 1, 0), tl.maximum(p1 - window, 0)
        hi, full_hi = p1, p0 + 1
    if not MASK_TOKENS:
        hi, full_hi = seeing, seeing
    return lo, full_lo, tl.minimum(full_hi, seeing), tl.minimum(hi, seeing)


@triton.jit
def _tile_of_program(tiles, heads):
    """(tile, image, head) of this program; tiles of one head are neighbours, as they share its keys or rows."""
    i_program = tl.program_id(0).to(tl.uint32)
    i_bh = i_program // tiles.to(tl.uint32)
    i_b = i_bh // heads.to(tl.uint32)
    return (i_program - i_bh * tiles).to(tl.int32), i_b.to(tl.int64), (i_bh - i_b * heads).to(tl.int64)


@triton.jit
def _result_offsets(i_b, i_h, tokens, targets, heads, MASK_TOKENS: tl.constexpr):
    """Where the rows of an image and head start in contiguous streams (content, query), in units of a row."""
    content_rows = tokens + (targets if MASK_TOKENS else 0)
    return i_b * content_rows * heads + i_h, i_b * targets * heads + i_h


@triton.jit(do_not_specialize=["s_cr", "s_qr", "s_kr", "s_vr", "cut", "tokens", "targets", "heads", "tiles"])
def forward_kernel(
    q_content, q_query, k, v, out_content, out_query, lse_content, lse_query, cuts, perm,
    s_cb, s_cr, s_ch, s_qb, s_qr, s_qh, s_kb, s_kr, s_kh, s_vb, s_vr, s_vh,
    scale, cut, tokens, targets, heads, tiles,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WITH_CONTENT: tl.constexpr, MASK_TOKENS: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O = softmax(scale * Q K^T over visible keys) V, and its log-sum-exp. One program a row tile, image and head."""
    i_tile, i_b, i_h = _tile_of_program(tiles, heads)
    c, real, window, seeing = _sizes(cuts, cut, i_b, tokens, targets, WITH_CONTENT, MASK_TOKENS)
    x0 = i_tile * BM
    x = x0 + tl.arange(0, BM)
    sees = x < seeing
    row, is_query, exists = _place(
        x, c, real, window, tokens, targets, perm, i_b, cuts is not None, WITH_CONTENT, MASK_TOKENS
    )
    d = tl.arange(0, BD)
    q_content += i_b * s_cb + i_h * s_ch
    q_query += i_b * s_qb + i_h * s_qh
    p_q = _row_pointers(q_content, q_query, row, s_cr, s_qr, is_query, WITH_CONTENT)
    b_q = load_rows(p_q, d, sees, D, BD, ALIGNED, True)
    shift = _shift(x, window, WITH_CONTENT)

    k += i_b * s_kb + i_h * s_kh
    v += i_b * s_vb + i_h * s_vh
    b_acc = tl.zeros([BM, BD], ACC)
    b_max = tl.full([BM], float("-inf"), ACC)
    b_sum = tl.zeros([BM], ACC)
    lo, full_lo, full_hi, hi = _keys_of_rows(x0, seeing, window, BM, WITH_CONTENT, MASK_TOKENS)
    key = tl.arange(0, BN)
    for p0 in range(lo, hi, BN):
        i_key = _key_rows(tl.minimum(p0 + key, hi - 1), real, tokens, perm, i_b, False, MASK_TOKENS)
        b_k = load_rows(k + row_offset(i_key, s_kr), d, None, D, BD, ALIGNED, False)  # (BN, BD)
        b_v = load_rows(v + row_offset(i_key, s_vr), d, None, D, BD, ALIGNED, False)
        b_s = scores(b_q, b_k, ACC, PRECISION)  # (BM, BN)
        b_s = mask_scores(
            b_s, key[None, :], (shift - p0)[:, None], (window + shift - p0)[:, None],
            (p0 < full_lo) if MASK_TOKENS else False, p0 + BN > full_hi,
        )  # fmt: skip
        b_acc, b_max, b_sum = softmax_step(b_acc, b_max, b_sum, b_s, b_v, scale, ACC, PRECISION)

    b_out, b_lse = softmax_result(b_acc, b_max, b_sum, sees, scale)
    o_content, o_query = _result_offsets(i_b, i_h, tokens, targets, heads, MASK_TOKENS)
    p_out = _row_pointers(
        out_content + o_content * D, out_query + o_query * D, row, heads * D, heads * D, is_query, WITH_CONTENT
    )
    p_lse = _row_pointers(lse_content + o_content, lse_query + o_query, row, heads, heads, is_query, WITH_CONTENT)
    store_rows(p_out, d, exists, b_out, D, BD, ALIGNED)
    tl.store(p_lse, b_lse, mask=exists)


@triton.jit(do_not_specialize=["s_cr", "s_qr", "s_kr", "s_vr", "cut", "tokens", "targets", "heads", "tiles"])
def query_gradient_kernel(
    q_content, q_query, k, v, out_content, out_query, do_content, do_query, lse_content, lse_query,
    statistics, dq_content, dq_query, cuts, perm,
    s_cb, s_cr, s_ch, s_qb, s_qr, s_qh, s_kb, s_kr, s_kh, s_vb, s_vr, s_vh,
    scale, cut, tokens, targets, heads, tiles,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr,
    WITH_CONTENT: tl.constexpr, MASK_TOKENS: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = scale * dS K    with    dS = P * (dO V^T - delta)    and    delta = rowsum(dO * O).

    One program a row tile, image and head. It leaves statistics, (B, H, tiles * BM + TAIL, 2) by x, for the kernel of
    the keys, which reads up to TAIL rows beyond the last.
    """
    i_tile, i_b, i_h = _tile_of_program(tiles, heads)
    c, real, window, seeing = _sizes(cuts, cut, i_b, tokens, targets, WITH_CONTENT, MASK_TOKENS)
    x0 = i_tile * BM
    x = x0 + tl.arange(0, BM)
    sees = x < seeing
    row, is_query, exists = _place(
        x, c, real, window, tokens, targets, perm, i_b, cuts is not None, WITH_CONTENT, MASK_TOKENS
    )
    d = tl.arange(0, BD)
    o_content, o_query = _result_offsets(i_b, i_h, tokens, targets, heads, MASK_TOKENS)
    q_content += i_b * s_cb + i_h * s_ch
    q_query += i_b * s_qb + i_h * s_qh
    p_q = _row_pointers(q_content, q_query, row, s_cr, s_qr, is_query, WITH_CONTENT)
    p_do = _row_pointers(
        do_content + o_content * D, do_query + o_query * D, row, heads * D, heads * D, is_query, WITH_CONTENT
    )
    p_out = _row_pointers(
        out_content + o_content * D, out_query + o_query * D, row, heads * D, heads * D, is_query, WITH_CONTENT
    )
    p_lse = _row_pointers(lse_content + o_content, lse_query + o_query, row, heads, heads, is_query, WITH_CONTENT)
    b_q = load_rows(p_q, d, sees, D, BD, ALIGNED, True)
    b_do = load_rows(p_do, d, sees, D, BD, ALIGNED, True)
    b_out = load_rows(p_out, d, sees, D, BD, ALIGNED, True)
    b_lse = tl.load(p_lse, mask=sees, other=0.0) * LOG2_E
    b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)  # of rows that see no key: their scores stay -inf
    b_delta = tl.sum(b_do.to(ACC) * b_out.to(ACC), 1)
    store_statistics(
        statistics + 2 * (i_b * heads + i_h) * (tiles * BM + TAIL), b_lse, b_delta, i_tile, tiles, BM, TAIL
    )
    shift = _shift(x, window, WITH_CONTENT)

    k += i_b * s_kb + i_h * s_kh
    v += i_b * s_vb + i_h * s_vh
    b_dq = tl.zeros([BM, BD], ACC)
    lo, full_lo, full_hi, hi = _keys_of_rows(x0, seeing, window, BM, WITH_CONTENT, MASK_TOKENS)
    key = tl.arange(0, BN)
    for p0 in range(lo, hi, BN):
        i_key = _key_rows(tl.minimum(p0 + key, hi - 1), real, tokens, perm, i_b, False, MASK_TOKENS)
        b_k = load_rows(k + row_offset(i_key, s_kr), d, None, D, BD, ALIGNED, False)  # (BN, BD)
        b_v = load_rows(v + row_offset(i_key, s_vr), d, None, D, BD, ALIGNED, False)
        b_s = scores(b_q, b_k, ACC, PRECISION)  # (BM, BN)
        b_dp = scores(b_do, b_v, ACC, PRECISION)
        b_s = mask_scores(
            b_s, key[None, :], (shift - p0)[:, None], (window + shift - p0)[:, None],
            (p0 < full_lo) if MASK_TOKENS else False, p0 + BN > full_hi,
        )  # fmt: skip
        b_dq = query_gradient_step(b_dq, b_s, b_dp, b_k, b_lse[:, None], b_delta[:, None], scale, ACC, PRECISION)
    p_dq = _row_pointers(
        dq_content + o_content * D, dq_query + o_query * D, row, heads * D, heads * D, is_query, WITH_CONTENT
    )
    store_rows(p_dq, d, exists, tl.where(sees[:, None], b_dq * scale, 0.0), D, BD, ALIGNED)


@triton.jit(
    do_not_specialize=[
        *("s_cr", "s_qr", "s_kr", "s_vr", "s_dkr", "s_dvr"),
        *("cut", "tokens", "targets", "heads", "tiles", "skipped", "statistics_rows"),
    ]
)
def key_gradient_kernel(
    q_content, q_query, k, v, do_content, do_query, statistics, dk, dv,
    cuts, perm,
    s_cb, s_cr, s_ch, s_qb, s_qr, s_qh, s_kb, s_kr, s_kh, s_vb, s_vr, s_vh, s_dkb, s_dkr, s_dkh, s_dvb, s_dvr, s_dvh,
    scale, cut, tokens, targets, heads, tiles, skipped, statistics_rows,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WITH_CONTENT: tl.constexpr, MASK_TOKENS: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV = P^T dO and dK = scale * dS^T Q. One program a key tile, image and head: no atomics, one order of addition.

    The first tile is short of `skipped` keys, so that fewer tiles of rows are visited. The statistics,
    (B, H, statistics_rows, 2), are those of the kernel of dQ.
    """
    i_tile, i_b, i_h = _tile_of_program(tiles, heads)
    c, real, window, seeing = _sizes(cuts, cut, i_b, tokens, targets, WITH_CONTENT, MASK_TOKENS)
    content_rows = tokens + (targets if MASK_TOKENS else 0)
    p0 = i_tile * BN - skipped
    p = p0 + tl.arange(0, BN)
    m_exists = (p >= 0) & (p < content_rows)
    i_key = _key_rows(
        tl.minimum(tl.maximum(p, 0), content_rows - 1), real, tokens, perm, i_b, cuts is not None, MASK_TOKENS
    )
    d = tl.arange(0, BD)
    m_seen = m_exists & (p < window + real)  # whatever the others hold, NaN maybe, must reach no result
    b_k = load_rows(k + i_b * s_kb + i_h * s_kh + row_offset(i_key, s_kr), d, m_seen, D, BD, ALIGNED, True)
    b_v = load_rows(v + i_b * s_vb + i_h * s_vh + row_offset(i_key, s_vr), d, m_seen, D, BD, ALIGNED, True)

    o_content, o_query = _result_offsets(i_b, i_h, tokens, targets, heads, MASK_TOKENS)
    q_content += i_b * s_cb + i_h * s_ch
    q_query += i_b * s_qb + i_h * s_qh
    do_content += o_content * D
    do_query += o_query * D
    statistics += 2 * (i_b * heads + i_h) * (statistics_rows // 16 * 16)
    b_dk = tl.zeros([BN, BD], ACC)
    b_dv = tl.zeros([BN, BD], ACC)
    lo, full_lo, full_hi, hi = _rows_of_keys(tl.maximum(p0, 0), p0 + BN, seeing, window, WITH_CONTENT, MASK_TOKENS)
    for x0 in range(lo // 4 * 4, hi, BM):
        x = x0 + tl.arange(0, BM)
        row, is_query, _ = _place(
            tl.minimum(x, seeing - 1), c, real, window, tokens, targets, perm, i_b, False, WITH_CONTENT, MASK_TOKENS
        )
        p_q = _row_pointers(q_content, q_query, row, s_cr, s_qr, is_query, WITH_CONTENT)
        p_do = _row_pointers(do_content, do_query, row, heads * D, heads * D, is_query, WITH_CONTENT)
        b_q = load_rows(p_q, d, None, D, BD, ALIGNED, False)  # (BM, BD)
        b_do = load_rows(p_do, d, None, D, BD, ALIGNED, False)
        b_lse, b_delta = load_statistics(statistics, x0, BM)
        shift = _shift(x, window, WITH_CONTENT)
        first = tl.where(x < seeing, shift if MASK_TOKENS else 0, UNSEEN)
        b_s = scores(b_k, b_q, ACC, PRECISION)  # (BN, BM)
        b_dp = scores(b_v, b_do, ACC, PRECISION)
        b_s = mask_scores(b_s, p[:, None], first[None, :], (window + shift)[None, :], x0 + BM > full_hi, x0 < full_lo)
        b_dk, b_dv = key_gradient_step(
            b_dk, b_dv, b_s, b_dp, b_q, b_do, b_lse[None, :], b_delta[None, :], scale, ACC, PRECISION
        )
    o_dk = i_b * s_dkb + i_h * s_dkh + row_offset(i_key, s_dkr)
    o_dv = i_b * s_dvb + i_h * s_dvh + row_offset(i_key, s_dvr)
    store_rows(dk + o_dk, d, m_exists, b_dk * scale, D, BD, ALIGNED)
    store_rows(dv + o_dv, d, m_exists, b_dv, D, BD, ALIGNED)
