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
    query_gradient_step,
    signed_queries,
    softmax_result,
    softmax_step,
    store_rows,
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
def _window(prefix, skip, sees, content, suffix, BN: tl.constexpr):
    """The window of keys of a tile of rows (BM,), and its blocks of BN keys.

    Returns (most, least, window, lead, resume, plain, masked): the blocks [0, lead) and `plain - lead` blocks from
    `resume` on need no mask, `masked` others do.
    """
    most = tl.max(tl.where(sees, prefix, 0), 0)
    least = tl.min(tl.where(sees, skip, suffix), 0)
    all_before = tl.minimum(tl.min(tl.where(sees, prefix, content), 0), most)
    all_after = most - least + tl.maximum(tl.max(tl.where(sees, skip, 0), 0), least)
    window = most + suffix - least
    lead = all_before // BN
    resume = tl.where(all_after == all_before, lead, tl.cdiv(all_after, BN))
    plain = lead + tl.maximum(window // BN - resume, 0)
    return most, least, window, lead, resume, plain, tl.cdiv(window, BN) - plain


@triton.jit
def _masked_block(i, lead, resume, plain):
    """The i-th block with a mask: those in [lead, resume), then the last."""
    return i + tl.where(i < resume - lead, lead, plain)


@triton.jit
def _plain_block(i, lead, resume):
    """The i-th block without a mask: those before `lead`, then from `resume` on."""
    return i + tl.where(i < lead, 0, resume - lead)


@triton.jit
def _keys_and_mask(block, prefix, skip, most, least, window, content, BN: tl.constexpr):
    """Memory rows (BN,) of the keys of a block, which of them exist, and which (BM, BN) the rows see."""
    u = block * BN + tl.arange(0, BN)
    m_key = u < window
    key = tl.where(u < most, u, u + (content + least - most)).to(tl.int64)
    m_visible = (u[None, :] < prefix[:, None]) | (u[None, :] >= (most - least + skip)[:, None])
    return key, m_key, m_visible & m_key[None, :]


@triton.jit
def _tile_of_program(tiles, heads):
    """(tile, image, head) of this program; tiles of one head are neighbours, as they share its keys."""
    i_program = tl.program_id(0)
    i_bh = i_program // tiles
    return i_program % tiles, (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)


@triton.jit(do_not_specialize=["cut", "rows", "content", "suffix", "heads", "tiles"])
def forward_kernel(
    q, k, v, out, lse, shift, cuts,
    s_qb, s_qr, s_qh, s_kb, s_kr, s_kh, s_vb, s_vr, s_vh, s_sb, s_sr,
    cut, rows, content, suffix, heads, tiles,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O = softmax(SCALE * Q K^T over visible keys) V, and its log-sum-exp. One program a row tile, image and head."""
    i_tile, i_b, i_h = _tile_of_program(tiles, heads)
    c = cut_of_image(cuts, cut, i_b)
    row = (i_tile * BM + tl.arange(0, BM)).to(tl.int64)
    exists = row < rows
    prefix, skip, sees = _visible_range(shift + i_b * s_sb + row * s_sr, exists, c, content, suffix)
    d = tl.arange(0, BD)
    b_q = load_rows(q + i_b * s_qb + i_h * s_qh + row * s_qr, d, sees, D, BD, ALIGNED, True)
    b_q = signed_queries(b_q, SCALE)
    STEEP: tl.constexpr = 1.0 if SCALE == 0 else (SCALE if SCALE > 0 else -SCALE)

    k += i_b * s_kb + i_h * s_kh
    v += i_b * s_vb + i_h * s_vh
    b_acc = tl.zeros([BM, BD], ACC)
    b_max = tl.full([BM], float("-inf"), ACC)
    b_sum = tl.zeros([BM], ACC)
    most, least, window, lead, resume, plain, masked = _window(prefix, skip, sees, content, suffix, BN)
    for i in range(masked):
        block = _masked_block(i, lead, resume, plain)
        key, m_key, m_visible = _keys_and_mask(block, prefix, skip, most, least, window, content, BN)
        b_k = load_rows(k + key * s_kr, d, m_key, D, BD, ALIGNED, True)  # (BN, BD)
        b_v = load_rows(v + key * s_vr, d, m_key, D, BD, ALIGNED, True)
        b_acc, b_max, b_sum = softmax_step(
            b_acc, b_max, b_sum, b_q, b_k, b_v, m_visible, STEEP, ACC, PRECISION, True
        )  # fmt: skip
    for i in range(plain):
        block = _plain_block(i, lead, resume)
        key, m_key, m_visible = _keys_and_mask(block, prefix, skip, most, least, window, content, BN)
        b_k = load_rows(k + key * s_kr, d, m_key, D, BD, ALIGNED, False)
        b_v = load_rows(v + key * s_vr, d, m_key, D, BD, ALIGNED, False)
        b_acc, b_max, b_sum = softmax_step(
            b_acc, b_max, b_sum, b_q, b_k, b_v, m_visible, STEEP, ACC, PRECISION, False
        )  # fmt: skip

    b_out, b_lse = softmax_result(b_acc, b_max, b_sum, sees, STEEP)
    o_result = (i_b * rows + row) * heads + i_h
    store_rows(out + o_result * D, d, exists, b_out, D, BD, ALIGNED)
    tl.store(lse + o_result, b_lse, mask=exists)


@triton.jit(do_not_specialize=["cut", "rows", "content", "suffix", "heads", "tiles"])
def query_gradient_kernel(
    q, k, v, out, do, lse, lse_base_2, delta, dq, shift, cuts,
    s_qb, s_qr, s_qh, s_kb, s_kr, s_kh, s_vb, s_vr, s_vh, s_sb, s_sr,
    cut, rows, content, suffix, heads, tiles,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = SCALE * dS K    with    dS = P * (dO V^T - delta)    and    delta = rowsum(dO * O).

    One program a row tile, image and head. It leaves delta and the LSE in base 2, both (B, H, R), for the kernel of the
    keys.
    """
    i_tile, i_b, i_h = _tile_of_program(tiles, heads)
    c = cut_of_image(cuts, cut, i_b)
    row = (i_tile * BM + tl.arange(0, BM)).to(tl.int64)
    exists = row < rows
    prefix, skip, sees = _visible_range(shift + i_b * s_sb + row * s_sr, exists, c, content, suffix)
    d = tl.arange(0, BD)
    o_result = (i_b * rows + row) * heads + i_h
    b_q = load_rows(q + i_b * s_qb + i_h * s_qh + row * s_qr, d, sees, D, BD, ALIGNED, True)
    b_do = load_rows(do + o_result * D, d, sees, D, BD, ALIGNED, True)
    b_out = load_rows(out + o_result * D, d, sees, D, BD, ALIGNED, True)
    b_lse = tl.load(lse + o_result, mask=sees, other=0.0) * LOG2_E
    b_delta = tl.sum(b_do.to(ACC) * b_out.to(ACC), 1)
    o_statistic = (i_b * heads + i_h) * rows + row
    tl.store(lse_base_2 + o_statistic, b_lse, mask=sees)
    tl.store(delta + o_statistic, b_delta, mask=sees)

    k += i_b * s_kb + i_h * s_kh
    v += i_b * s_vb + i_h * s_vh
    b_dq = tl.zeros([BM, BD], ACC)
    most, least, window, lead, resume, plain, masked = _window(prefix, skip, sees, content, suffix, BN)
    for i in range(masked):
        block = _masked_block(i, lead, resume, plain)
        key, m_key, m_visible = _keys_and_mask(block, prefix, skip, most, least, window, content, BN)
        b_k = load_rows(k + key * s_kr, d, m_key, D, BD, ALIGNED, True)  # (BN, BD)
        b_v = load_rows(v + key * s_vr, d, m_key, D, BD, ALIGNED, True)
        b_dq = query_gradient_step(
            b_dq, b_q, b_do, b_lse, b_delta, b_k, b_v, m_visible, SCALE, ACC, PRECISION, True
        )  # fmt: skip
    for i in range(plain):
        block = _plain_block(i, lead, resume)
        key, m_key, m_visible = _keys_and_mask(block, prefix, skip, most, least, window, content, BN)
        b_k = load_rows(k + key * s_kr, d, m_key, D, BD, ALIGNED, False)
        b_v = load_rows(v + key * s_vr, d, m_key, D, BD, ALIGNED, False)
        b_dq = query_gradient_step(
            b_dq, b_q, b_do, b_lse, b_delta, b_k, b_v, m_visible, SCALE, ACC, PRECISION, False
        )  # fmt: skip
    store_rows(dq + o_result * D, d, exists, tl.where(sees[:, None], b_dq * SCALE, 0.0), D, BD, ALIGNED)


@triton.jit(do_not_specialize=["cut", "rows", "content", "suffix", "row_tiles", "tiles"])
def row_tile_list_kernel(
    shift, cuts, lists, s_sb, s_sr, cut, rows, content, suffix, row_tiles, tiles,
    BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """List the row tiles that see any key of a key tile: one program, one list (row_tiles + 2,), a tile and image.

    Tiles whose rows all see all of the key tile stand from the front on, the others from the back on; then the numbers
    of both.
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
    lists += i_program.to(tl.int64) * (row_tiles + 2)
    plain = 0
    masked = 0
    for first in range(0, row_tiles, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        row = (tile[:, None] * BM + tl.arange(0, BM)[None, :]).to(tl.int64)  # (CHUNK, BM)
        exists = row < rows
        prefix, skip, sees = _visible_range(shift + i_b * s_sb + row * s_sr, exists, c, content, suffix)
        sees_any = sees & ((prefix > p0) | (skip < p1 - content))
        sees_all = sees & (prefix >= content_end) & (skip <= suffix_start)
        m_plain = tl.min(sees_all.to(tl.int32), 1)  # (CHUNK,)
        m_masked = tl.max(sees_any.to(tl.int32), 1) - m_plain
        tl.store(lists + plain + tl.cumsum(m_plain, 0) - 1, tile, mask=m_plain > 0)
        tl.store(lists + row_tiles - masked - tl.cumsum(m_masked, 0), tile, mask=m_masked > 0)
        plain += tl.sum(m_plain, 0)
        masked += tl.sum(m_masked, 0)
    tl.store(lists + row_tiles, plain)
    tl.store(lists + row_tiles + 1, masked)


@triton.jit
def _take_rows(
    b_dk, b_dv, b_k, b_v, p, tile, q, do, lse_base_2, delta, shift, s_qr, s_sr, c, rows, content, suffix, heads, d,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what one row tile gives to dK / SCALE and dV of the keys (BN,) at p."""
    row = (tile * BM + tl.arange(0, BM)).to(tl.int64)
    prefix, skip, sees = _visible_range(shift + row * s_sr, row < rows, c, content, suffix)
    m_visible = sees[None, :] & ((p[:, None] < prefix[None, :]) | (p[:, None] >= (content + skip)[None, :]))
    b_q = load_rows(q + row * s_qr, d, sees, D, BD, ALIGNED, MASKED)  # (BM, BD)
    b_do = load_rows(do + row * heads * D, d, sees, D, BD, ALIGNED, MASKED)
    if MASKED:
        b_lse = tl.load(lse_base_2 + row, mask=sees, other=0.0)
        b_delta = tl.load(delta + row, mask=sees, other=0.0)
    else:
        b_lse = tl.load(lse_base_2 + row)
        b_delta = tl.load(delta + row)
    return key_gradient_step(
        b_dk, b_dv, b_k, b_v, b_q, b_do, b_lse, b_delta, m_visible, SCALE, ACC, PRECISION, MASKED
    )  # fmt: skip


@triton.jit(do_not_specialize=["cut", "rows", "content", "suffix", "heads", "row_tiles", "tiles"])
def key_gradient_kernel(
    q, k, v, do, lse_base_2, delta, dk, dv, lists, shift, cuts,
    s_qb, s_qr, s_qh, s_kb, s_kr, s_kh, s_vb, s_vr, s_vh, s_sb, s_sr, s_lb,
    cut, rows, content, suffix, heads, row_tiles, tiles,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV = P^T dO and dK = SCALE * dS^T Q. One program a key tile, image and head: no atomics, one order of sums."""
    i_tile, i_b, i_h = _tile_of_program(tiles, heads)
    c = cut_of_image(cuts, cut, i_b)
    p = i_tile * BN + tl.arange(0, BN)
    m_key = p < content + suffix
    key = p.to(tl.int64)
    d = tl.arange(0, BD)
    b_k = load_rows(k + i_b * s_kb + i_h * s_kh + key * s_kr, d, m_key, D, BD, ALIGNED, True)
    b_v = load_rows(v + i_b * s_vb + i_h * s_vh + key * s_vr, d, m_key, D, BD, ALIGNED, True)

    q += i_b * s_qb + i_h * s_qh
    do += (i_b * rows * heads + i_h) * D
    lse_base_2 += (i_b * heads + i_h) * rows
    delta += (i_b * heads + i_h) * rows
    shift += i_b * s_sb
    lists += i_b * s_lb + i_tile.to(tl.int64) * (row_tiles + 2)
    plain = tl.load(lists + row_tiles)
    masked = tl.load(lists + row_tiles + 1)
    b_dk = tl.zeros([BN, BD], ACC)
    b_dv = tl.zeros([BN, BD], ACC)
    for i in range(masked):
        tile = tl.load(lists + row_tiles - 1 - i)
        b_dk, b_dv = _take_rows(
            b_dk, b_dv, b_k, b_v, p, tile, q, do, lse_base_2, delta, shift, s_qr, s_sr, c, rows, content, suffix,
            heads, d, SCALE, D, BD, BM, ALIGNED, ACC, PRECISION, True,
        )  # fmt: skip
    for i in range(plain):
        tile = tl.load(lists + i)
        b_dk, b_dv = _take_rows(
            b_dk, b_dv, b_k, b_v, p, tile, q, do, lse_base_2, delta, shift, s_qr, s_sr, c, rows, content, suffix,
            heads, d, SCALE, D, BD, BM, ALIGNED, ACC, PRECISION, False,
        )  # fmt: skip
    o_key = ((i_b * (content + suffix) + key) * heads + i_h) * D
    store_rows(dk + o_key, d, m_key, b_dk * SCALE, D, BD, ALIGNED)
    store_rows(dv + o_key, d, m_key, b_dv, D, BD, ALIGNED)
