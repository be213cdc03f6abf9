"""Attention under the prefix-suffix rule: forward, gradient of the queries, gradient of the keys and values.

Of C content keys, then S suffix keys, a row of shift s under cut c sees (visibility.py)

    content keys j < prefix    prefix = c + s, within [0, C]
    suffix keys j >= skip      skip = s, within [0, S]

Shifts have any values in any order, so a tile of rows takes the smallest and largest prefix and skip of its rows. What
its rows may see, laid out as one window of positions u without the gap in between:

    u < most                content key u      most: the largest prefix
    most <= u < window      key u + gap        gap = C + least - most, least: the smallest skip

A row sees u < prefix and u >= most + skip - least. Only blocks of u between those bounds, and the last, need a mask.
The kernel of dK and dV goes through a list of the row tiles that see any of its keys, from `row_tile_list_kernel`.
Shifts and cuts of any value move no access out of its tensor; rows and keys beyond the last read the last.

Names: R rows, D head size, BD = D padded to a power of two; BM rows and BN keys of a tile. i_ index, o_ offset, m_
mask, p_ pointers, b_ block in registers. Outputs, statistics and gradients are contiguous (B, rows, H, D) and
(B, rows, H); q, k and v have any strides, the last one 1; shifts any strides. What happens to tiles in registers is in
attention_tiles.py.
"""

import triton
import triton.language as tl

from mapet_kernels.attention_tiles import (
    LOG2_E,
    cut_of_image,
    key_gradient_step,
    load_rows,
    load_statistics,
    query_gradient_step,
    row_offset,
    scores,
    softmax_result,
    softmax_step,
    store_rows,
    store_statistics,
)


@triton.jit
def _visible_range(p_shift, exists, c, content, suffix):
    """(prefix, skip, sees) of rows, in the shape of the pointers to their shifts."""
    s = tl.load(p_shift, mask=exists, other=0)
    # Clamped in 64 bits, whatever the shift; the results fit 32.
    prefix = tl.minimum(tl.maximum(s + c, 0), content).to(tl.int32)
    skip = tl.minimum(tl.maximum(s, 0), suffix).to(tl.int32)
    return prefix, skip, exists & ((prefix > 0) | (skip < suffix))


@triton.jit
def _window(prefix, skip, sees, content, suffix):
    """The window of keys of a tile of rows (BM,): (most, least, window, all_before, all_after).

    Every row sees the keys u < all_before and those from all_after on.
    """
    most = tl.max(tl.where(sees, prefix, 0), 0)
    least = tl.min(tl.where(sees, skip, suffix), 0)
    all_before = tl.minimum(tl.min(tl.where(sees, prefix, content), 0), most)
    all_after = most - least + tl.maximum(tl.max(tl.where(sees, skip, 0), 0), least)
    return most, least, most + suffix - least, all_before, all_after


@triton.jit
def _mask(b_s, u0, u, prefix, skip, most, least, window, all_before, all_after, BN: tl.constexpr):
    """Scores (BM, BN), -inf where a row does not see the key u of the window; few blocks have such keys."""
    if ((u0 + BN > all_before) & (u0 < all_after)) | (u0 + BN > window):
        m_visible = (u[None, :] < prefix[:, None]) | (u[None, :] >= (most - least + skip)[:, None])
        b_s = tl.where(m_visible & (u < window)[None, :], b_s, float("-inf"))
    return b_s


@triton.jit
def _tile_of_program(tiles, heads):
    """(tile, image, head) of this program; tiles of one head are neighbours, as they share its keys."""
    i_program = tl.program_id(0)
    i_bh = i_program // tiles
    return i_program % tiles, (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)


@triton.jit(do_not_specialize=["s_qr", "s_kr", "s_vr", "s_sr", "cut", "rows", "content", "suffix", "heads", "tiles"])
def forward_kernel(
    q, k, v, out, lse, shift, cuts,
    s_qb, s_qr, s_qh, s_kb, s_kr, s_kh, s_vb, s_vr, s_vh, s_sb, s_sr,
    scale, cut, rows, content, suffix, heads, tiles,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O = softmax(scale * Q K^T over visible keys) V, and its log-sum-exp. One program a row tile, image and head."""
    i_tile, i_b, i_h = _tile_of_program(tiles, heads)
    c = cut_of_image(cuts, cut, i_b)
    row = i_tile * BM + tl.arange(0, BM)
    exists = row < rows
    prefix, skip, sees = _visible_range(shift + i_b * s_sb + row_offset(row, s_sr), exists, c, content, suffix)
    d = tl.arange(0, BD)
    b_q = load_rows(q + i_b * s_qb + i_h * s_qh + row_offset(row, s_qr), d, sees, D, BD, ALIGNED, True)

    k += i_b * s_kb + i_h * s_kh
    v += i_b * s_vb + i_h * s_vh
    b_acc = tl.zeros([BM, BD], ACC)
    b_max = tl.full([BM], float("-inf"), ACC)
    b_sum = tl.zeros([BM], ACC)
    most, least, window, all_before, all_after = _window(prefix, skip, sees, content, suffix)
    for u0 in range(0, window, BN):
        u = u0 + tl.arange(0, BN)
        key = tl.minimum(u, window - 1)
        key = tl.where(key < most, key, key + (content + least - most))
        b_k = load_rows(k + row_offset(key, s_kr), d, None, D, BD, ALIGNED, False)  # (BN, BD)
        b_v = load_rows(v + row_offset(key, s_vr), d, None, D, BD, ALIGNED, False)
        b_s = scores(b_q, b_k, ACC, PRECISION)  # (BM, BN)
        b_s = _mask(b_s, u0, u, prefix, skip, most, least, window, all_before, all_after, BN)
        b_acc, b_max, b_sum = softmax_step(b_acc, b_max, b_sum, b_s, b_v, scale, ACC, PRECISION)

    b_out, b_lse = softmax_result(b_acc, b_max, b_sum, sees, scale)
    o_result = (i_b * rows + row) * heads + i_h
    store_rows(out + o_result * D, d, exists, b_out, D, BD, ALIGNED)
    tl.store(lse + o_result, b_lse, mask=exists)


@triton.jit(do_not_specialize=["s_qr", "s_kr", "s_vr", "s_sr", "cut", "rows", "content", "suffix", "heads", "tiles"])
def query_gradient_kernel(
    q, k, v, out, do, lse, statistics, dq, shift, cuts,
    s_qb, s_qr, s_qh, s_kb, s_kr, s_kh, s_vb, s_vr, s_vh, s_sb, s_sr,
    scale, cut, rows, content, suffix, heads, tiles,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = scale * dS K    with    dS = P * (dO V^T - delta)    and    delta = rowsum(dO * O).

    One program a row tile, image and head. It leaves statistics, (B, H, tiles * BM + TAIL, 2), for the kernel of the
    keys.
    """
    i_tile, i_b, i_h = _tile_of_program(tiles, heads)
    c = cut_of_image(cuts, cut, i_b)
    row = i_tile * BM + tl.arange(0, BM)
    exists = row < rows
    prefix, skip, sees = _visible_range(shift + i_b * s_sb + row_offset(row, s_sr), exists, c, content, suffix)
    d = tl.arange(0, BD)
    o_result = (i_b * rows + row) * heads + i_h
    b_q = load_rows(q + i_b * s_qb + i_h * s_qh + row_offset(row, s_qr), d, sees, D, BD, ALIGNED, True)
    b_do = load_rows(do + o_result * D, d, sees, D, BD, ALIGNED, True)
    b_out = load_rows(out + o_result * D, d, sees, D, BD, ALIGNED, True)
    b_lse = tl.load(lse + o_result, mask=sees, other=0.0) * LOG2_E
    b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)  # of rows that see no key: their scores stay -inf
    b_delta = tl.sum(b_do.to(ACC) * b_out.to(ACC), 1)
    store_statistics(
        statistics + 2 * (i_b * heads + i_h) * (tiles * BM + TAIL), b_lse, b_delta, i_tile, tiles, BM, TAIL
    )

    k += i_b * s_kb + i_h * s_kh
    v += i_b * s_vb + i_h * s_vh
    b_dq = tl.zeros([BM, BD], ACC)
    most, least, window, all_before, all_after = _window(prefix, skip, sees, content, suffix)
    for u0 in range(0, window, BN):
        u = u0 + tl.arange(0, BN)
        key = tl.minimum(u, window - 1)
        key = tl.where(key < most, key, key + (content + least - most))
        b_k = load_rows(k + row_offset(key, s_kr), d, None, D, BD, ALIGNED, False)  # (BN, BD)
        b_v = load_rows(v + row_offset(key, s_vr), d, None, D, BD, ALIGNED, False)
        b_s = scores(b_q, b_k, ACC, PRECISION)  # (BM, BN)
        b_dp = scores(b_do, b_v, ACC, PRECISION)
        b_s = _mask(b_s, u0, u, prefix, skip, most, least, window, all_before, all_after, BN)
        b_dq = query_gradient_step(b_dq, b_s, b_dp, b_k, b_lse[:, None], b_delta[:, None], scale, ACC, PRECISION)
    store_rows(dq + o_result * D, d, exists, tl.where(sees[:, None], b_dq * scale, 0.0), D, BD, ALIGNED)


@triton.jit(do_not_specialize=["s_sr", "cut", "rows", "content", "suffix", "row_tiles", "tiles"])
def row_tile_list_kernel(
    shift, cuts, lists, s_sb, s_sr, cut, rows, content, suffix, row_tiles, tiles,
    BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """List the row tiles that see any key of a key tile: one program, one list (2 row_tiles + 3,), a tile and image.

    Of row_tiles numbers those of tiles whose rows all see all of the key tile stand from the front on, the others from
    the back on, but those with rows that see no key at all: they stand in the next row_tiles numbers. What such rows
    hold, NaN maybe, must reach no result. Then the three counts.
    """
    i_program = tl.program_id(0)
    i_b = (i_program // tiles).to(tl.int64)
    p0 = i_program % tiles * BN
    p1 = tl.minimum(p0 + BN, content + suffix)
    # The tile has content keys [p0, content_end) and suffix keys [suffix_start, p1 - content). Where it has none of a
    # run, these bounds let every row see all of that run.
    content_end = tl.where(p0 < content, tl.minimum(p1, content), 0)
    suffix_start = tl.where(p1 > content, tl.maximum(p0 - content, 0), suffix)
    c = cut_of_image(cuts, cut, i_b)
    lists += i_program.to(tl.int64) * (2 * row_tiles + 3)
    plain = 0
    masked = 0
    blind = 0
    for first in range(0, row_tiles, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        row = tile[:, None] * BM + tl.arange(0, BM)[None, :]  # (CHUNK, BM)
        exists = row < rows
        prefix, skip, sees = _visible_range(shift + i_b * s_sb + row_offset(row, s_sr), exists, c, content, suffix)
        sees_any = sees & ((prefix > p0) | (skip < p1 - content))
        sees_all = sees & (prefix >= content_end) & (skip <= suffix_start)
        m_plain = tl.min(sees_all.to(tl.int32), 1)  # (CHUNK,)
        m_blind = tl.minimum(tl.max((exists & (sees == 0)).to(tl.int32), 1), tl.max(sees_any.to(tl.int32), 1))
        m_masked = tl.max(sees_any.to(tl.int32), 1) - m_plain - m_blind
        tl.store(lists + plain + tl.cumsum(m_plain, 0) - 1, tile, mask=m_plain > 0)
        tl.store(lists + row_tiles - masked - tl.cumsum(m_masked, 0), tile, mask=m_masked > 0)
        tl.store(lists + row_tiles + blind + tl.cumsum(m_blind, 0) - 1, tile, mask=m_blind > 0)
        plain += tl.sum(m_plain, 0)
        masked += tl.sum(m_masked, 0)
        blind += tl.sum(m_blind, 0)
    tl.store(lists + 2 * row_tiles, plain)
    tl.store(lists + 2 * row_tiles + 1, masked)
    tl.store(lists + 2 * row_tiles + 2, blind)


@triton.jit(
    do_not_specialize=[
        *("s_qr", "s_kr", "s_vr", "s_sr"),
        *("cut", "rows", "content", "suffix", "heads", "row_tiles", "tiles", "statistics_rows"),
    ]
)
def key_gradient_kernel(
    q, k, v, do, statistics, dk, dv, lists, shift, cuts,
    s_qb, s_qr, s_qh, s_kb, s_kr, s_kh, s_vb, s_vr, s_vh, s_sb, s_sr, s_lb,
    scale, cut, rows, content, suffix, heads, row_tiles, tiles, statistics_rows,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV = P^T dO and dK = scale * dS^T Q. One program a key tile, image and head: no atomics, one order of sums.

    The statistics, (B, H, statistics_rows, 2), are those of the kernel of dQ.
    """
    i_tile, i_b, i_h = _tile_of_program(tiles, heads)
    c = cut_of_image(cuts, cut, i_b)
    p = i_tile * BN + tl.arange(0, BN)
    m_key = p < content + suffix
    key = p
    d = tl.arange(0, BD)
    b_k = load_rows(k + i_b * s_kb + i_h * s_kh + row_offset(key, s_kr), d, m_key, D, BD, ALIGNED, True)
    b_v = load_rows(v + i_b * s_vb + i_h * s_vh + row_offset(key, s_vr), d, m_key, D, BD, ALIGNED, True)

    q += i_b * s_qb + i_h * s_qh
    do += (i_b * rows * heads + i_h) * D
    statistics += 2 * (i_b * heads + i_h) * (statistics_rows // 16 * 16)
    shift += i_b * s_sb
    lists += i_b * s_lb + i_tile.to(tl.int64) * (2 * row_tiles + 3)
    plain = tl.load(lists + 2 * row_tiles)
    masked = tl.load(lists + 2 * row_tiles + 1)
    blind = tl.load(lists + 2 * row_tiles + 2)
    b_dk = tl.zeros([BN, BD], ACC)
    b_dv = tl.zeros([BN, BD], ACC)
    for i in range(plain + masked + blind):
        o_tile = tl.where(i < plain + masked, row_tiles - 1 - (i - plain), row_tiles + (i - plain - masked))
        tile = tl.load(lists + tl.where(i < plain, i, o_tile))
        x = tile * BM + tl.arange(0, BM)
        row = tl.minimum(x, rows - 1)
        p_shift = shift + row_offset(row, s_sr)
        m_row = x >= 0
        if i >= plain + masked:
            m_row = _visible_range(p_shift, x < rows, c, content, suffix)[2]
        b_q = load_rows(q + row_offset(row, s_qr), d, m_row, D, BD, ALIGNED, True)  # (BM, BD)
        b_do = load_rows(do + row_offset(row, heads * D), d, m_row, D, BD, ALIGNED, True)
        b_lse, b_delta = load_statistics(statistics, tile * BM, BM)
        b_s = scores(b_k, b_q, ACC, PRECISION)  # (BN, BM)
        b_dp = scores(b_v, b_do, ACC, PRECISION)
        if i >= plain:
            prefix, skip, sees = _visible_range(p_shift, x < rows, c, content, suffix)
            m_visible = (p[:, None] < prefix[None, :]) | (p[:, None] >= (content + skip)[None, :])
            b_s = tl.where(m_visible & sees[None, :], b_s, float("-inf"))
        b_dk, b_dv = key_gradient_step(
            b_dk, b_dv, b_s, b_dp, b_q, b_do, b_lse[None, :], b_delta[None, :], scale, ACC, PRECISION
        )
    o_key = ((i_b * (content + suffix) + key) * heads + i_h) * D
    store_rows(dk + o_key, d, m_key, b_dk * scale, D, BD, ALIGNED)
    store_rows(dv + o_key, d, m_key, b_dv, D, BD, ALIGNED)
