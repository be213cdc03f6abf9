"""Nearest centroid: 16-bit operands with their rounding errors, scores with a running argmin, the decision.

The formulas, the error bound and its proof are in bound.py. No scores are kept: a program owns BM rows, loops
over its share of the centroids, and keeps for every row either the best score (fast) or the few centroids that the
bound cannot exclude (exact).

Names: n rows, K centroids, D features; BM rows and BN centroids of a tile, BK features of one product; G groups, S
shares of the centroids. i_ index, o_ offset, m_ mask, b_ block in registers. `x` and `c` in `scores_kernel` are
matrices (G n, D) and (G K, D), D padded to BK, K to BN. Rows are counted in 32 bits, offsets in lists in 64.
"""

import triton
import triton.language as tl

from mapet_kernels.kmeans_assign import bound, passes

NO_ID = tl.constexpr(2**31 - 1)
WIDER = tl.constexpr(bound.WIDER)
ROUNDINGS = tl.constexpr(bound.ROUNDINGS)
SUM_ROUNDINGS = tl.constexpr(bound.SUM_ROUNDINGS)
TINY = tl.constexpr(bound.TINY)
LARGE = tl.constexpr(bound.LARGE)
UNDECIDED = tl.constexpr(passes.UNDECIDED)
OPEN = tl.constexpr(passes.OPEN)


@triton.jit
def _power_of_two(largest):
    """The power of two (fp32) that brings a magnitude to [2^13, 2^14), as far as it is a normal number; 1 for zero."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    field = tl.minimum(tl.maximum(267 - exponent, 1), 227)
    return tl.where(largest == 0, 127 << 23, field << 23).to(tl.float32, bitcast=True)


@triton.jit
def _load_features(p_rows, d, s_d, D, m_row, WORK: tl.constexpr):
    """Features d (BLOCK,) of rows at pointers p_rows (R,), (R, BLOCK); 0 where masked and beyond D."""
    m = m_row[:, None] & (d < D)[None, :]
    return tl.load(p_rows[:, None] + d[None, :] * s_d, mask=m, other=0.0).to(WORK)


@triton.jit
def _row_pointers(p, i_row, n, s_g, s_n):
    """Pointers (R,) to rows i_row of a tensor (G, n, D), counted through the groups."""
    return p + i_row // n * s_g + i_row % n * s_n


@triton.jit(do_not_specialize=["K", "padded_clusters", "total"])
def centroids_kernel(
    centroids, mean, largest, c, bias, slope, slack, s_cg, s_ck, s_cd, K, D, padded_clusters, padded_features, total,
    CENTRED: tl.constexpr, ROW_ROUNDING: tl.constexpr, PRODUCT_ROUNDING: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program R centroids: P (c - m) rounded to 16 bits, P^2 b, and the coefficients of the error bound."""
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    m_row = i < total
    i_group = tl.minimum(i // padded_clusters, total // padded_clusters - 1)
    m_real = m_row & (i % padded_clusters < K)
    scale = _power_of_two(tl.load(largest + i_group)).to(tl.float64)[:, None]
    p_rows = centroids + i_group * s_cg + i % padded_clusters * s_ck
    b_norm = tl.zeros([R, BLOCK], tl.float64)
    b_cross = tl.zeros([R, BLOCK], tl.float64)
    b_terms = tl.zeros([R, BLOCK], tl.float64)
    b_lost = tl.zeros([R, BLOCK], tl.float64)
    b_kept = tl.zeros([R, BLOCK], tl.float64)
    for o in range(0, padded_features, BLOCK):
        d = o + tl.arange(0, BLOCK)
        b_mean = _load_features(mean + i_group * D, d, 1, D, m_real, tl.float64) * scale
        b = _load_features(p_rows, d, s_cd, D, m_real, tl.float64) * scale - b_mean
        b_16 = b.to(tl.float32).to(c.dtype.element_ty)
        m = m_row[:, None] & (d < padded_features)[None, :]
        tl.store(c + i[:, None] * padded_features + d[None, :], b_16, mask=m)
        b_rounded = b_16.to(tl.float32).to(tl.float64)
        b_norm += b * b
        b_cross += b * b_mean
        b_terms += b * b + 2 * tl.abs(b * b_mean)
        b_lost += (b - b_rounded) * (b - b_rounded)
        b_kept += b_rounded * b_rounded
    squares = tl.sum(b_norm, 1)
    if not CENTRED:
        squares += 2 * tl.sum(b_cross, 1)
    lost = tl.sqrt(tl.sum(b_lost, 1))
    norm = tl.sqrt(tl.sum(b_kept, 1)) + lost
    error = WIDER * (lost + (ROW_ROUNDING + PRODUCT_ROUNDING + ROUNDINGS) * norm)
    allowance = ROUNDINGS * tl.abs(squares) + SUM_ROUNDINGS * tl.sum(b_terms, 1) + TINY
    tl.store(slope + i, error.to(tl.float32), mask=m_row)
    tl.store(slack + i, allowance.to(tl.float32), mask=m_row)
    tl.store(bias + i, tl.where(m_real, squares - allowance, float("inf")).to(tl.float32), mask=m_row)


@triton.jit(do_not_specialize=["n", "rows"])
def rows_kernel(
    x, mean, largest, copy, row_scale, radius, s_xg, s_xn, s_xd, n, rows, D, padded_features,
    COPY: tl.constexpr, CENTRED: tl.constexpr, ROW_ROUNDING: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program R rows: their factors -2 P / W and radii r of the error bound; with COPY, W (x - m) in 16 bits."""
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    m_row = i < rows
    i_group = tl.minimum(i, rows - 1) // n
    p_rows = _row_pointers(x, i, n, s_xg, s_xn)
    scale = tl.full([R], 1.0, tl.float32)
    if COPY:
        b_largest = tl.zeros([R, BLOCK], tl.float32)
        for o in range(0, D, BLOCK):
            d = o + tl.arange(0, BLOCK)
            b = _load_features(p_rows, d, s_xd, D, m_row, tl.float32)
            if CENTRED:
                b -= _load_features(mean + i_group * D, d, 1, D, m_row, tl.float32)
            b_largest = tl.maximum(b_largest, tl.abs(b))
        scale = _power_of_two(tl.max(b_largest, 1))
    b_kept = tl.zeros([R, BLOCK], tl.float32)
    b_lost = tl.zeros([R, BLOCK], tl.float32)
    b_finite = tl.full([R, BLOCK], 1, tl.int32)
    for o in range(0, padded_features, BLOCK):
        d = o + tl.arange(0, BLOCK)
        b = _load_features(p_rows, d, s_xd, D, m_row, tl.float32)
        b_finite = tl.where(tl.abs(b) < float("inf"), b_finite, 0)
        if COPY:
            if CENTRED:
                b -= _load_features(mean + i_group * D, d, 1, D, m_row, tl.float32)
            b *= scale[:, None]
            b_16 = b.to(copy.dtype.element_ty)
            m = m_row[:, None] & (d < padded_features)[None, :]
            tl.store(copy + i[:, None] * padded_features + d[None, :], b_16, mask=m)
            b_rounded = b_16.to(tl.float32)
            b_lost += (b - b_rounded) * (b - b_rounded)
            b = b_rounded
        b_kept += b * b
    factor = -2 * _power_of_two(tl.load(largest + i_group)) / scale
    norm = WIDER * tl.sqrt(tl.sum(b_kept, 1))
    if COPY:
        lost = WIDER * tl.sqrt(tl.sum(b_lost, 1)) + 2.0**-22 * norm + 2.0**-60
        norm = tl.maximum(norm, lost / ROW_ROUNDING)
    # Beyond these limits the products with the factor may leave the range of fp32: an infinite radius decides nothing.
    reach = WIDER * norm * -factor
    safe = (tl.min(b_finite, 1) == 1) & (reach < LARGE) & (-factor > TINY)
    tl.store(radius + i, tl.where(safe, reach, float("inf")), mask=m_row)
    tl.store(row_scale + i, factor, mask=m_row)


@triton.jit
def _load_tile(p, row, rows, o_d, stride, BR: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Features [o_d, o_d + BK) of BR rows from `row` on, (BR, BK); a row from `rows` on may hold anything finite."""
    if DESCRIPTORS:
        b = p.load([row, o_d])
    else:
        i = tl.minimum(row + tl.arange(0, BR), rows - 1).to(tl.int64)
        b = tl.load(p + i[:, None] * stride + (o_d + tl.arange(0, BK))[None, :])
    return b


@triton.jit
def _hits(b_min, b_reach, b_held, b_lowest, CAPACITY: tl.constexpr):
    """Rows (BM,) whose lowest bound so far unseen may belong to the nearest centroid.

    Infinity and NaN never do. A full list takes no more, unless the bound is a new lowest, which may empty it.
    """
    m = (tl.abs(b_min) < float("inf")) & (b_min <= b_reach)
    return m & ((b_held <= CAPACITY) | (b_min < b_lowest))


@triton.jit(do_not_specialize=["n", "rows", "padded_clusters", "centroid_rows", "row_tiles", "shares", "share_tiles"])
def scores_kernel(
    x, c, bias, slope, slack, row_scale, radius, largest, best, ids, held, reach,
    n, rows, s_x, padded_clusters, centroid_rows, padded_features, row_tiles, shares, share_tiles,
    EXACT: tl.constexpr, CAPACITY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ONE_PRODUCT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One program BM rows of a group and a share of its centroids: score = bias + row_scale * (x . c), never stored.

    Fast: `best` (S, G n) and `ids`, of the lowest score, ties to the lowest id. Exact: `best` (S, CAPACITY, G n) and
    `ids`, lower bounds and ids of centroids that may be the nearest; `held` (S, G n) how many, CAPACITY + 1 if that was
    not enough; `reach` (S, G n) an upper bound of the lowest exact score.
    """
    i_share = tl.program_id(0) % shares
    i_tile = tl.program_id(0) // shares % row_tiles
    i_group = tl.program_id(0) // shares // row_tiles
    i = i_tile * BM + tl.arange(0, BM)
    m_row = i < n
    i_row = i_group * n + i
    if row_scale is not None:
        b_scale = tl.load(row_scale + i_row, mask=m_row, other=0.0)
    else:
        b_scale = tl.zeros([BM], tl.float32) - 2 * _power_of_two(tl.load(largest + i_group))
    first = i_group * n + i_tile * BM
    if ONE_PRODUCT:
        b_x = _load_tile(x, first, rows, 0, s_x, BM, BK, DESCRIPTORS)
    if EXACT:
        b_radius = tl.load(radius + i_row, mask=m_row, other=0.0)
        # Rows that are padding or out of range hold nothing, so that no time is spent on them.
        b_reach = tl.where(m_row & (b_radius < float("inf")), float("inf"), -float("inf"))
        b_lowest = tl.full([BM], float("inf"), tl.float32)
        b_held = tl.zeros([BM], tl.int32)
    else:
        b_best = tl.full([BM], float("inf"), tl.float32)
        b_id = tl.zeros([BM], tl.int32)
    list_rows = rows.to(tl.int64)
    o_list = i_share * CAPACITY * list_rows + i_row
    start = i_share * share_tiles * BN
    stop = tl.minimum(start + share_tiles * BN, padded_clusters)
    for o_k in range(start, stop, BN):
        centroid = i_group * padded_clusters + o_k
        if ONE_PRODUCT:
            b_c = _load_tile(c, centroid, centroid_rows, 0, padded_features, BN, BK, DESCRIPTORS)
            # (BM, BK) @ (BK, BN) -> (BM, BN)
            b_s = tl.dot(b_x, tl.trans(b_c))
        else:
            b_s = tl.zeros([BM, BN], tl.float32)
            for o_d in range(0, padded_features, BK):
                b_x = _load_tile(x, first, rows, o_d, s_x, BM, BK, DESCRIPTORS)
                b_c = _load_tile(c, centroid, centroid_rows, o_d, padded_features, BN, BK, DESCRIPTORS)
                b_s = tl.dot(b_x, tl.trans(b_c), b_s)
        k = o_k + tl.arange(0, BN)
        b_bias = tl.load(bias + i_group * padded_clusters + k)
        if EXACT:
            b_slope = tl.load(slope + i_group * padded_clusters + k)
            b_s = b_s * b_scale[:, None] + b_bias[None, :] - b_radius[:, None] * b_slope[None, :]
            b_min = tl.min(b_s, 1)
            m_hit = _hits(b_min, b_reach, b_held, b_lowest, CAPACITY)
            # Triton keeps no copies in flight in a loop that has another right in its body: this one is in a branch.
            if tl.max(m_hit.to(tl.int32), 0) > 0:
                while tl.max(m_hit.to(tl.int32), 0) > 0:
                    # The lowest id at the minimum of the rows that are hit.
                    i_min = tl.min(tl.where(b_s == b_min[:, None], k[None, :], NO_ID), 1)
                    o_min = i_group * padded_clusters + i_min
                    b_width = b_radius * tl.load(slope + o_min, mask=m_hit, other=0.0)
                    b_width += tl.load(slack + o_min, mask=m_hit, other=0.0)
                    b_upper = b_min + 2 * b_width
                    b_reach = tl.where(m_hit, tl.minimum(b_reach, b_upper), b_reach)
                    b_held = tl.where(m_hit & (b_lowest > b_reach), 0, b_held)  # all that was held is out
                    m_kept = m_hit & (b_held < CAPACITY)
                    tl.store(best + o_list + b_held * list_rows, b_min, mask=m_kept)
                    tl.store(ids + o_list + b_held * list_rows, i_min, mask=m_kept)
                    b_held = tl.where(m_hit, tl.minimum(b_held + 1, CAPACITY + 1), b_held)
                    b_lowest = tl.where(m_hit, tl.minimum(b_lowest, b_min), b_lowest)
                    b_s = tl.where(k[None, :] == i_min[:, None], float("inf"), b_s)
                    b_min = tl.min(b_s, 1)
                    m_hit = _hits(b_min, b_reach, b_held, b_lowest, CAPACITY)
        else:
            b_s = b_s * b_scale[:, None] + b_bias[None, :]
            b_min = tl.min(b_s, 1)
            i_min = tl.min(tl.where(b_s == b_min[:, None], k[None, :], NO_ID), 1)
            m_hit = b_min < b_best
            b_id = tl.where(m_hit, i_min, b_id)
            b_best = tl.where(m_hit, b_min, b_best)
    o_share = i_share * list_rows + i_row
    if EXACT:
        tl.store(held + o_share, b_held, mask=m_row)
        tl.store(reach + o_share, b_reach, mask=m_row)
    else:
        tl.store(best + o_share, b_best, mask=m_row)
        tl.store(ids + o_share, b_id, mask=m_row)


@triton.jit(do_not_specialize=["rows", "shares"])
def merge_kernel(
    best, ids, held, reach, nearest, status, rows, shares,
    EXACT: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program BLOCK rows: the shares' results into ids int64 and, per row, 0 (decided), UNDECIDED or OPEN."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    list_rows = rows.to(tl.int64)
    m_row = i < rows
    b_best = tl.full([BLOCK], float("inf"), tl.float32)
    b_id = tl.zeros([BLOCK], tl.int32)
    if EXACT:
        b_reach = tl.full([BLOCK], float("inf"), tl.float32)
        for i_share in range(shares):
            b_reach = tl.minimum(b_reach, tl.load(reach + i_share * list_rows + i, mask=m_row, other=0.0))
        b_candidates = tl.zeros([BLOCK], tl.int32)
        m_open = tl.abs(b_reach) == float("inf")
        for i_share in range(shares):
            o_share = i_share * list_rows
            b_held = tl.load(held + o_share + i, mask=m_row, other=0)
            m_open = m_open | (b_held > CAPACITY)
            for i_slot in range(CAPACITY):
                o = o_share * CAPACITY + i_slot * list_rows + i
                m_slot = m_row & (i_slot < b_held)
                b_bound = tl.load(best + o, mask=m_slot, other=float("inf"))
                m_candidate = m_slot & (b_bound <= b_reach)
                b_candidates += m_candidate.to(tl.int32)
                b_id = tl.where(m_candidate, tl.load(ids + o, mask=m_slot, other=0), b_id)
        b_status = tl.where(b_candidates == 1, 0, UNDECIDED)
        b_status = tl.where(m_open | (b_candidates == 0), OPEN, b_status)
    else:
        for i_share in range(shares):
            o = i_share * list_rows + i
            b_score = tl.load(best + o, mask=m_row, other=0.0)
            b_id = tl.where(b_score < b_best, tl.load(ids + o, mask=m_row, other=0), b_id)
            b_best = tl.minimum(b_best, b_score)
        b_status = tl.where(tl.abs(b_best) < float("inf"), 0, OPEN)
    tl.store(nearest + i, b_id.to(tl.int64), mask=m_row)
    tl.store(status + i, b_status.to(tl.int8), mask=m_row)


@triton.jit
def _squared_distances(p_rows, p_centroids, s_xd, s_cd, D, m_row, BLOCK: tl.constexpr):
    """sum((x - c)^2) (R,) in float64, the terms added in the same order for every centroid."""
    b_sum = tl.zeros([p_rows.shape[0], BLOCK], tl.float64)
    for o in range(0, D, BLOCK):
        d = o + tl.arange(0, BLOCK)
        b = _load_features(p_rows, d, s_xd, D, m_row, tl.float64)
        b -= _load_features(p_centroids, d, s_cd, D, m_row, tl.float64)
        b_sum += b * b
    return tl.sum(b_sum, 1)


@triton.jit(do_not_specialize=["n", "rows", "shares"])
def decide_kernel(
    x, centroids, flagged, status, best, ids, held, reach, nearest,
    s_xg, s_xn, s_xd, s_cg, s_ck, s_cd, n, rows, D, shares,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a flagged row: the nearest of its candidates by float64 distances, ties to the lowest id."""
    i_row = tl.load(flagged + tl.program_id(0) + tl.arange(0, 1))  # (1,)
    m_row = tl.load(status + i_row) == UNDECIDED
    i_group = i_row // n
    list_rows = rows.to(tl.int64)
    p_rows = _row_pointers(x, i_row, n, s_xg, s_xn)
    b_reach = tl.full([1], float("inf"), tl.float32)
    for i_share in range(shares):
        b_reach = tl.minimum(b_reach, tl.load(reach + i_share * list_rows + i_row))
    b_smallest = tl.full([1], float("inf"), tl.float64)
    b_id = tl.full([1], NO_ID, tl.int32)
    for i_share in range(shares):
        b_held = tl.load(held + i_share * list_rows + i_row)
        for i_slot in range(CAPACITY):
            o = (i_share * CAPACITY + i_slot) * list_rows + i_row
            m = m_row & (i_slot < b_held)
            m = m & (tl.load(best + o, mask=m, other=float("inf")) <= b_reach)
            if tl.max(m.to(tl.int32), 0) > 0:
                candidate = tl.load(ids + o, mask=m, other=0)
                p_centroids = centroids + i_group * s_cg + candidate.to(tl.int64) * s_ck
                distance = _squared_distances(p_rows, p_centroids, s_xd, s_cd, D, m, BLOCK)
                nearer = (distance < b_smallest) | ((distance == b_smallest) & (candidate < b_id))
                b_id = tl.where(nearer, candidate, b_id)
                b_smallest = tl.where(nearer, distance, b_smallest)
    tl.store(nearest + i_row, b_id.to(tl.int64), mask=m_row)


@triton.jit(do_not_specialize=["n", "rows"])
def distances_kernel(
    x, centroids, nearest, distances, s_xg, s_xn, s_xd, s_cg, s_ck, s_cd, n, rows, D,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program R rows: their squared distances to their centroids, summed in float64."""
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    m_row = i < rows
    p_centroids = centroids + i // n * s_cg + tl.load(nearest + i, mask=m_row, other=0) * s_ck
    p_rows = _row_pointers(x, i, n, s_xg, s_xn)
    b = _squared_distances(p_rows, p_centroids, s_xd, s_cd, D, m_row, BLOCK)
    tl.store(distances + i, b.to(tl.float32), mask=m_row)
