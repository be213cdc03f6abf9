"""Two-stream attention: forward, gradient of the queries, gradient of the keys and values.

With the keys in the order M, A, B a row of shift s sees one window of keys p (visibility.py):

    s <= p < window + s        (0 <= p < window + s without mask tokens)

where `window` counts the keys that a row with s = 0 sees: N, or c without mask tokens. Rows come in two kinds of tiles:

    first tiles     rows with s = 0: A, then M. They share the window, so that nothing is masked but its end.
    target tiles    targets [i0, i1): B_i in the first half (s = i + 1), G_i in the second (s = i). They share the keys
                    [i0, window + i1), of which all rows see [i1, window + i0): masks only in tiles at the two ends.
                    Without content queries (last block) the tile holds G_i only.

With one cut per image `real` targets exist out of `targets`; the rest is padding, with results 0 and statistics -inf.

Names: N = tokens, T = targets, D head size, BD = D padded to a power of two; BM rows and BN keys of a tile, BI targets
of a target tile. i_ index, o_ offset, m_ mask, p_ pointers, b_ block in registers. Outputs, statistics and their
gradients are contiguous (B, rows, H, D) and (B, rows, H) for each stream; q, k, v, dk and dv have any strides, the last
one 1. Without content queries the content stream's arguments are not used.

What happens to tiles in registers is in attention_tiles.py.
"""

import triton
import triton.language as tl

from mapet_kernels.attention_tiles import (
    LOG2_E,
    cut_of_image,
    key_gradient_step,
    load_rows,
    query_gradient_step,
    signed_queries,
    softmax_result,
    softmax_step,
    store_rows,
)


@triton.jit
def _row_tile(
    is_first, start, cut, real, window, tokens, targets, perm, i_b,
    BM: tl.constexpr, BI: tl.constexpr, WITH_CONTENT: tl.constexpr, MASK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Rows of a tile, each (BM,): row in its stream's memory, is it a query row, shift, does it see, does it exist."""
    r = tl.arange(0, BM)
    if WITH_CONTENT:
        first = start + r
        target = start + r % BI
        is_query = (r >= BI) & (is_first == 0)
        # A padding mask token stands in for the content of a target that does not exist, so that someone writes it.
        content = tl.where(target < real, cut + target, tokens + target)
        row = tl.where(
            is_first, tl.where(first < cut, first, tokens + first - cut), tl.where(is_query, target, content)
        )
        shift = tl.where(is_first, 0, tl.where(is_query, target, target + 1))
        sees = tl.where(is_first, first < window, target < real)
        stop = tl.where(is_query, targets, targets if MASK_TOKENS else real)
        exists = tl.where(is_first, first < window, target < stop)
        if perm is not None:
            m_moved = exists & (row < tokens) & (is_query == 0)
            row = tl.where(m_moved, tl.load(perm + i_b * tokens + row, mask=m_moved, other=0).to(tl.int32), row)
    else:
        row = start + r
        is_query = row >= 0
        shift = row
        sees = row < real
        exists = row < targets
    return row, is_query, shift, sees, exists


@triton.jit
def _row_pointers(content, query, row, s_content, s_query, is_query, WITH_CONTENT: tl.constexpr):
    """Pointers (BM,) to rows of one image and head, given pointers and row strides of its two streams."""
    if WITH_CONTENT:
        p = tl.where(is_query, query, content) + row * tl.where(is_query, s_query, s_content)
    else:
        p = query + row * s_query
    return p


@triton.jit
def _statistic_offsets(
    is_first, start, tokens, targets, BM: tl.constexpr, BI: tl.constexpr, WITH_CONTENT: tl.constexpr
):
    """Where the rows (BM,) of a tile have their statistics in the workspace (B, H, N + 2 T) of one image and head.

    First rows, then B, then G: neighbours in a tile are neighbours in memory, and no offset needs 64 bits.
    """
    r = tl.arange(0, BM)
    if WITH_CONTENT:
        target = tokens + start + r % BI + tl.where(r >= BI, targets, 0)
        o = tl.where(is_first, start + r, target)
    else:
        o = tokens + targets + start + r
    return o


@triton.jit
def _result_offsets(i_b, i_h, content_rows, targets, heads):
    """Where the rows of an image and head start in contiguous streams (content, query), in units of a row."""
    return i_b * content_rows * heads + i_h, i_b * targets * heads + i_h


@triton.jit
def _key_rows(p, masks, tokens, perm, i_b, m_key, MASK_TOKENS: tl.constexpr):
    """Memory rows (BN,) of keys at positions p of the order M, A, B, padding."""
    if MASK_TOKENS:
        row = tl.where(p < masks, tokens + p, tl.where(p < masks + tokens, p - masks, p))
    else:
        row = p
    if perm is not None:
        m_moved = m_key & (row < tokens)
        row = tl.where(m_moved, tl.load(perm + i_b * tokens + row, mask=m_moved, other=0).to(tl.int32), row)
    return row


@triton.jit
def _visible(p, shift, window, MASK_TOKENS: tl.constexpr):
    """p and shift broadcast against each other: which keys a row sees."""
    m = p < window + shift
    if MASK_TOKENS:
        m = m & (p >= shift)
    return m


@triton.jit
def _split(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """Cut [lo, hi) into blocks of which those inside [full_lo, full_hi) need no mask.

    Returns (first, last, lower, masked): [first, last) needs none; of `masked` other blocks `lower` come before first.
    """
    lower = tl.cdiv(tl.maximum(tl.minimum(full_lo, hi) - lo, 0), BLOCK)
    first = lo + lower * BLOCK
    last = first + tl.maximum(tl.minimum(full_hi, hi) - first, 0) // BLOCK * BLOCK
    return first, last, lower, lower + tl.cdiv(tl.maximum(hi - last, 0), BLOCK)


@triton.jit
def _keys_of_rows(is_first, start, real, window, BI: tl.constexpr, BN: tl.constexpr, MASK_TOKENS: tl.constexpr):
    """Blocks of keys that a tile of rows visits: (lo, end, first, last, lower, masked), see `_split`.

    No key is read from `end` on.
    """
    stop = tl.minimum(start + BI, real)
    some = is_first | (stop > start)
    lo = tl.where(is_first, 0, start if MASK_TOKENS else 0)
    full_lo = tl.where(is_first, 0, stop if MASK_TOKENS else 0)
    full_hi = tl.where(is_first, window, window + start)
    hi = tl.where(some, tl.where(is_first, window, window + stop), lo)
    first, last, lower, masked = _split(lo, hi, full_lo, full_hi, BN)
    return lo, hi, first, last, lower, masked


@triton.jit
def _tile_of_program(first_tiles, tiles, heads, BM: tl.constexpr, BI: tl.constexpr):
    """(is_first, start, image, head) of this program; tiles of one head are neighbours, as they share its keys."""
    i_program = tl.program_id(0)
    i_tile = i_program % tiles
    i_bh = i_program // tiles
    is_first = i_tile < first_tiles
    start = tl.where(is_first, i_tile * BM, (i_tile - first_tiles) * BI)
    return is_first, start, (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)


@triton.jit
def _forward_step(
    b_acc, b_max, b_sum, b_q, start, end, k, v, s_kr, s_vr, masks, tokens, perm, i_b, shift, window, d,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASK_TOKENS: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys [start, start + BN) into the online softmax of one row tile."""
    p = start + tl.arange(0, BN)
    m_key = p < end
    key = _key_rows(p, masks, tokens, perm, i_b, m_key, MASK_TOKENS).to(tl.int64)
    b_k = load_rows(k + key * s_kr, d, m_key, D, BD, ALIGNED, MASKED)  # (BN, BD)
    b_v = load_rows(v + key * s_vr, d, m_key, D, BD, ALIGNED, MASKED)
    m_visible = _visible(p[None, :], shift[:, None], window, MASK_TOKENS)
    return softmax_step(b_acc, b_max, b_sum, b_q, b_k, b_v, m_visible, SCALE, ACC, PRECISION, MASKED)


@triton.jit(do_not_specialize=["cut", "tokens", "targets", "heads", "first_tiles", "tiles"])
def forward_kernel(
    q_content, q_query, k, v, out_content, out_query, lse_content, lse_query, cuts, perm,
    s_cb, s_cr, s_ch, s_qb, s_qr, s_qh, s_kb, s_kr, s_kh, s_vb, s_vr, s_vh,
    cut, tokens, targets, heads, first_tiles, tiles,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WITH_CONTENT: tl.constexpr, MASK_TOKENS: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O = softmax(SCALE * Q K^T over visible keys) V, and its log-sum-exp. One program a row tile, image and head."""
    BI: tl.constexpr = BM // 2 if WITH_CONTENT else BM
    is_first, start, i_b, i_h = _tile_of_program(first_tiles, tiles, heads, BM, BI)
    c = cut_of_image(cuts, cut, i_b).to(tl.int32)
    real = tokens - c
    masks = real if MASK_TOKENS else 0
    window = masks + c
    content_rows = tokens + (targets if MASK_TOKENS else 0)
    row, is_query, shift, sees, exists = _row_tile(
        is_first, start, c, real, window, tokens, targets, perm, i_b, BM, BI, WITH_CONTENT, MASK_TOKENS
    )
    row = row.to(tl.int64)
    d = tl.arange(0, BD)
    o_content, o_query = _result_offsets(i_b, i_h, content_rows, targets, heads)
    q_content += i_b * s_cb + i_h * s_ch
    q_query += i_b * s_qb + i_h * s_qh
    p_q = _row_pointers(q_content, q_query, row, s_cr, s_qr, is_query, WITH_CONTENT)
    b_q = load_rows(p_q, d, sees, D, BD, ALIGNED, True)
    b_q = signed_queries(b_q, SCALE)
    STEEP: tl.constexpr = 1.0 if SCALE == 0 else (SCALE if SCALE > 0 else -SCALE)

    k += i_b * s_kb + i_h * s_kh
    v += i_b * s_vb + i_h * s_vh
    b_acc = tl.zeros([BM, BD], ACC)
    b_max = tl.full([BM], float("-inf"), ACC)
    b_sum = tl.zeros([BM], ACC)
    lo, end, first, last, lower, masked = _keys_of_rows(is_first, start, real, window, BI, BN, MASK_TOKENS)
    for i in range(masked):
        o = tl.where(i < lower, lo + i * BN, last + (i - lower) * BN)
        b_acc, b_max, b_sum = _forward_step(
            b_acc, b_max, b_sum, b_q, o, end, k, v, s_kr, s_vr, masks, tokens, perm, i_b, shift, window, d,
            STEEP, D, BD, BN, MASK_TOKENS, ALIGNED, ACC, PRECISION, True,
        )  # fmt: skip
    for o in range(first, last, BN):
        b_acc, b_max, b_sum = _forward_step(
            b_acc, b_max, b_sum, b_q, o, end, k, v, s_kr, s_vr, masks, tokens, perm, i_b, shift, window, d,
            STEEP, D, BD, BN, MASK_TOKENS, ALIGNED, ACC, PRECISION, False,
        )  # fmt: skip

    b_out, b_lse = softmax_result(b_acc, b_max, b_sum, sees, STEEP)
    p_out = _row_pointers(
        out_content + o_content * D, out_query + o_query * D, row, heads * D, heads * D, is_query, WITH_CONTENT
    )
    p_lse = _row_pointers(lse_content + o_content, lse_query + o_query, row, heads, heads, is_query, WITH_CONTENT)
    store_rows(p_out, d, exists, b_out, D, BD, ALIGNED)
    tl.store(p_lse, b_lse, mask=exists)


@triton.jit
def _query_gradient_step(
    b_dq, b_q, b_do, b_lse, b_delta, start, end, k, v, s_kr, s_vr, masks, tokens, perm, i_b, shift, window, d,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASK_TOKENS: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the keys [start, start + BN) give to dQ / SCALE of one row tile."""
    p = start + tl.arange(0, BN)
    m_key = p < end
    key = _key_rows(p, masks, tokens, perm, i_b, m_key, MASK_TOKENS).to(tl.int64)
    b_k = load_rows(k + key * s_kr, d, m_key, D, BD, ALIGNED, MASKED)  # (BN, BD)
    b_v = load_rows(v + key * s_vr, d, m_key, D, BD, ALIGNED, MASKED)
    m_visible = _visible(p[None, :], shift[:, None], window, MASK_TOKENS)
    return query_gradient_step(b_dq, b_q, b_do, b_lse, b_delta, b_k, b_v, m_visible, SCALE, ACC, PRECISION, MASKED)


@triton.jit(do_not_specialize=["cut", "tokens", "targets", "heads", "first_tiles", "tiles"])
def query_gradient_kernel(
    q_content, q_query, k, v, out_content, out_query, do_content, do_query, lse_content, lse_query,
    lse_base_2, delta, dq_content, dq_query, cuts, perm,
    s_cb, s_cr, s_ch, s_qb, s_qr, s_qh, s_kb, s_kr, s_kh, s_vb, s_vr, s_vh,
    cut, tokens, targets, heads, first_tiles, tiles,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WITH_CONTENT: tl.constexpr, MASK_TOKENS: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = SCALE * dS K    with    dS = P * (dO V^T - delta)    and    delta = rowsum(dO * O).

    One program a row tile, image and head. It leaves delta and the LSE in base 2 for the kernel of the keys.
    """
    BI: tl.constexpr = BM // 2 if WITH_CONTENT else BM
    is_first, start, i_b, i_h = _tile_of_program(first_tiles, tiles, heads, BM, BI)
    c = cut_of_image(cuts, cut, i_b).to(tl.int32)
    real = tokens - c
    masks = real if MASK_TOKENS else 0
    window = masks + c
    content_rows = tokens + (targets if MASK_TOKENS else 0)
    row, is_query, shift, sees, exists = _row_tile(
        is_first, start, c, real, window, tokens, targets, perm, i_b, BM, BI, WITH_CONTENT, MASK_TOKENS
    )
    row = row.to(tl.int64)
    d = tl.arange(0, BD)
    o_content, o_query = _result_offsets(i_b, i_h, content_rows, targets, heads)
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
    b_delta = tl.sum(b_do.to(ACC) * b_out.to(ACC), 1)
    o_statistic = _statistic_offsets(is_first, start, tokens, targets, BM, BI, WITH_CONTENT)
    o_workspace = (i_b * heads + i_h) * (tokens + 2 * targets)
    tl.store(lse_base_2 + o_workspace + o_statistic, b_lse, mask=sees)
    tl.store(delta + o_workspace + o_statistic, b_delta, mask=sees)

    k += i_b * s_kb + i_h * s_kh
    v += i_b * s_vb + i_h * s_vh
    b_dq = tl.zeros([BM, BD], ACC)
    lo, end, first, last, lower, masked = _keys_of_rows(is_first, start, real, window, BI, BN, MASK_TOKENS)
    for i in range(masked):
        o = tl.where(i < lower, lo + i * BN, last + (i - lower) * BN)
        b_dq = _query_gradient_step(
            b_dq, b_q, b_do, b_lse, b_delta, o, end, k, v, s_kr, s_vr, masks, tokens, perm, i_b, shift, window, d,
            SCALE, D, BD, BN, MASK_TOKENS, ALIGNED, ACC, PRECISION, True,
        )  # fmt: skip
    for o in range(first, last, BN):
        b_dq = _query_gradient_step(
            b_dq, b_q, b_do, b_lse, b_delta, o, end, k, v, s_kr, s_vr, masks, tokens, perm, i_b, shift, window, d,
            SCALE, D, BD, BN, MASK_TOKENS, ALIGNED, ACC, PRECISION, False,
        )  # fmt: skip
    p_dq = _row_pointers(
        dq_content + o_content * D, dq_query + o_query * D, row, heads * D, heads * D, is_query, WITH_CONTENT
    )
    store_rows(p_dq, d, exists, tl.where(sees[:, None], b_dq * SCALE, 0.0), D, BD, ALIGNED)


@triton.jit
def _key_gradient_step(
    b_dk, b_dv, b_k, b_v, p, is_first, start, q_content, q_query, do_content, do_query, lse_base_2, delta,
    s_cr, s_qr, c, real, window, tokens, targets, heads, perm, i_b, d,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
    WITH_CONTENT: tl.constexpr, MASK_TOKENS: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what one row tile gives to dK / SCALE and dV of one key tile; all products transposed, (BN, BM)."""
    row, is_query, shift, sees, _ = _row_tile(
        is_first, start, c, real, window, tokens, targets, perm, i_b, BM, BI, WITH_CONTENT, MASK_TOKENS
    )
    row = row.to(tl.int64)
    p_q = _row_pointers(q_content, q_query, row, s_cr, s_qr, is_query, WITH_CONTENT)
    p_do = _row_pointers(do_content, do_query, row, heads * D, heads * D, is_query, WITH_CONTENT)
    o_statistic = _statistic_offsets(is_first, start, tokens, targets, BM, BI, WITH_CONTENT)
    b_q = load_rows(p_q, d, sees, D, BD, ALIGNED, MASKED)  # (BM, BD)
    b_do = load_rows(p_do, d, sees, D, BD, ALIGNED, MASKED)
    if MASKED:
        b_lse = tl.load(lse_base_2 + o_statistic, mask=sees, other=0.0)
        b_delta = tl.load(delta + o_statistic, mask=sees, other=0.0)
    else:
        b_lse = tl.load(lse_base_2 + o_statistic)
        b_delta = tl.load(delta + o_statistic)
    m_visible = sees[None, :] & _visible(p[:, None], shift[None, :], window, MASK_TOKENS)
    return key_gradient_step(b_dk, b_dv, b_k, b_v, b_q, b_do, b_lse, b_delta, m_visible, SCALE, ACC, PRECISION, MASKED)


@triton.jit(do_not_specialize=["cut", "tokens", "targets", "heads", "tiles"])
def key_gradient_kernel(
    q_content, q_query, k, v, do_content, do_query, lse_base_2, delta, dk, dv,
    cuts, perm,
    s_cb, s_cr, s_ch, s_qb, s_qr, s_qh, s_kb, s_kr, s_kh, s_vb, s_vr, s_vh, s_dkb, s_dkr, s_dkh, s_dvb, s_dvr, s_dvh,
    cut, tokens, targets, heads, tiles,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WITH_CONTENT: tl.constexpr, MASK_TOKENS: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV = P^T dO and dK = SCALE * dS^T Q. One program a key tile, image and head: no atomics, one order of addition.

    Keys [p0, p1) are seen by the rows with s = 0 if p < window, by B_i with p - window <= i < p and by G_i with
    p - window < i <= p (without mask tokens: to the last target). Rows that see all of the tile need no mask.
    """
    BI: tl.constexpr = BM // 2 if WITH_CONTENT else BM
    i_program = tl.program_id(0)
    i_b = (i_program // tiles // heads).to(tl.int64)
    i_h = (i_program // tiles % heads).to(tl.int64)
    p0 = i_program % tiles * BN
    p1 = p0 + BN
    c = cut_of_image(cuts, cut, i_b).to(tl.int32)
    real = tokens - c
    masks = real if MASK_TOKENS else 0
    window = masks + c
    content_rows = tokens + (targets if MASK_TOKENS else 0)
    p = p0 + tl.arange(0, BN)
    m_exists = p < content_rows
    m_key = p < masks + tokens
    key = _key_rows(p, masks, tokens, perm, i_b, m_key, MASK_TOKENS).to(tl.int64)
    d = tl.arange(0, BD)
    b_k = load_rows(k + i_b * s_kb + i_h * s_kh + key * s_kr, d, m_key, D, BD, ALIGNED, True)
    b_v = load_rows(v + i_b * s_vb + i_h * s_vh + key * s_vr, d, m_key, D, BD, ALIGNED, True)

    o_content, o_query = _result_offsets(i_b, i_h, content_rows, targets, heads)
    q_content += i_b * s_cb + i_h * s_ch
    q_query += i_b * s_qb + i_h * s_qh
    do_content += o_content * D
    do_query += o_query * D
    lse_base_2 += (i_b * heads + i_h) * (tokens + 2 * targets)
    delta += (i_b * heads + i_h) * (tokens + 2 * targets)
    if WITH_CONTENT:
        first_plain = tl.where(p1 <= window, window // BM, 0)
        first_masked = tl.where(p0 < window, tl.cdiv(window, BM), 0) - first_plain
    else:
        first_plain = p0 * 0
        first_masked = p0 * 0
    lo = tl.maximum(p0 - window, 0)
    hi = tl.maximum(tl.minimum(p1, real) if MASK_TOKENS else real, lo)
    full_hi = tl.minimum(p0, real) if MASK_TOKENS else real
    first, last, lower, masked = _split(lo, hi, p1 - window, full_hi, BI)

    b_dk = tl.zeros([BN, BD], ACC)
    b_dv = tl.zeros([BN, BD], ACC)
    for i in range(first_masked + masked):
        j = i - first_masked
        start = tl.where(j < lower, lo + j * BI, last + (j - lower) * BI)
        start = tl.where(j < 0, (first_plain + i) * BM, start)
        b_dk, b_dv = _key_gradient_step(
            b_dk, b_dv, b_k, b_v, p, j < 0, start, q_content, q_query, do_content, do_query, lse_base_2, delta,
            s_cr, s_qr, c, real, window, tokens, targets, heads, perm, i_b, d,
            SCALE, D, BD, BM, BI, WITH_CONTENT, MASK_TOKENS, ALIGNED, ACC, PRECISION, True,
        )  # fmt: skip
    for i in range(first_plain + (last - first) // BI):
        j = i - first_plain
        start = tl.where(j < 0, i * BM, first + j * BI)
        b_dk, b_dv = _key_gradient_step(
            b_dk, b_dv, b_k, b_v, p, j < 0, start, q_content, q_query, do_content, do_query, lse_base_2, delta,
            s_cr, s_qr, c, real, window, tokens, targets, heads, perm, i_b, d,
            SCALE, D, BD, BM, BI, WITH_CONTENT, MASK_TOKENS, ALIGNED, ACC, PRECISION, False,
        )  # fmt: skip
    o_dk = i_b * s_dkb + i_h * s_dkh + key * s_dkr
    o_dv = i_b * s_dvb + i_h * s_dvh + key * s_dvr
    store_rows(dk + o_dk, d, m_exists, b_dk * SCALE, D, BD, ALIGNED)
    store_rows(dv + o_dv, d, m_exists, b_dv, D, BD, ALIGNED)
