"""What the attention kernels do with tiles in registers, whoever sees whom: `@triton.jit` functions only.

Names: D head size, BD = D padded to a power of two; BM query rows and BN keys of a tile. m_ mask, p_ pointers, b_ block
in registers.

Statistics are those of softmax in base 2: P = 2^(S * scale * log2 e - LSE * log2 e); the LSE in memory is natural.
"""

import triton
import triton.language as tl

from mapet_kernels import backends

INTERPRETED = tl.constexpr(backends.INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def cut_of_image(cuts, cut, i_b):
    """The cut of an image: cuts[i_b] where there is one per image."""
    if cuts is not None:
        c = tl.load(cuts + i_b)
    else:
        c = cut
    return c


@triton.jit
def row_offset(row, stride):
    """row * stride in 64 bits, of int32 that are not negative: said so, it is one multiplication instead of four."""
    return row.to(tl.uint32).to(tl.int64) * stride.to(tl.uint32).to(tl.int64)


@triton.jit
def element_pointers(p_rows, d, ALIGNED: tl.constexpr):
    """Pointers (rows, BD) from those to rows (rows,)."""
    p = p_rows[:, None]
    if ALIGNED:  # Triton does not see it through tl.where, and would move single elements
        p = tl.multiple_of(p, (16, 16))
    return p + d[None, :]


@triton.jit
def load_rows(p_rows, d, m_row, D: tl.constexpr, BD: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """Rows (rows, BD) at pointers (rows,); zero where masked or beyond D."""
    p = element_pointers(p_rows, d, ALIGNED)
    if MASKED and BD != D:
        b = tl.load(p, mask=m_row[:, None] & (d < D)[None, :], other=0.0)
    elif MASKED:
        b = tl.load(p, mask=m_row[:, None], other=0.0)
    elif BD != D:
        b = tl.load(p, mask=(d < D)[None, :], other=0.0)
    else:
        b = tl.load(p)
    return b


@triton.jit
def store_rows(p_rows, d, m_row, b, D: tl.constexpr, BD: tl.constexpr, ALIGNED: tl.constexpr):
    """Store rows (rows, BD) at pointers (rows,), in the pointers' dtype."""
    p = element_pointers(p_rows, d, ALIGNED)
    if BD != D:
        tl.store(p, b.to(p.dtype.element_ty), mask=m_row[:, None] & (d < D)[None, :])
    else:
        tl.store(p, b.to(p.dtype.element_ty), mask=m_row[:, None])


@triton.jit
def store_statistics(statistics, b_lse, b_delta, i_tile, tiles, BM: tl.constexpr, TAIL: tl.constexpr):
    """Store (LSE in base 2, rowsum(dO * O)) of one row tile of `tiles`, of one image and head, for the kernel of dK.

    The first program adds TAIL rows of zeros after the last tile: what is read there is masked, but must be finite.
    """
    p = statistics + 2 * (i_tile * BM + tl.arange(0, BM))
    tl.store(p, b_lse)
    tl.store(p + 1, b_delta)
    tail = tl.arange(0, 2 * TAIL)
    tl.store(statistics + 2 * tiles * BM + tail, tail.to(b_lse.dtype) * 0, mask=(tail >= 0) & (i_tile == 0))


@triton.jit
def load_statistics(statistics, x0, BM: tl.constexpr):
    """(LSE in base 2, rowsum(dO * O)) of the rows [x0, x0 + BM): one block, so that it is moved 16 bytes at a time."""
    return tl.split(tl.reshape(tl.load(statistics + 2 * x0 + tl.arange(0, 2 * BM)), [BM, 2]))


@triton.jit
def scores(b_a, b_b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """(rows of A, rows of B): products of all rows of A (., BD) with all of B (., BD)."""
    return tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def opaque(x):
    """x itself, int32, of which the compiler knows nothing: it keeps a branch that it would compute both ways of."""
    if not INTERPRETED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)
    return x


@triton.jit
def mask_scores(b_s, key, first, last, m_before, m_after):
    """Scores, -inf where a row does not see a key of the tile: unless first <= key < last; broadcast against them.

    m_before, m_after: of the whole tile, whether it may have keys before, or after, the window of any row. Two
    comparisons in few tiles cost less than one in all.
    """
    if m_before:
        b_s = tl.where(key >= opaque(first), b_s, float("-inf"))
    if m_after:
        b_s = tl.where(key < opaque(last), b_s, float("-inf"))
    return b_s


@triton.jit
def softmax_step(b_acc, b_max, b_sum, b_s, b_v, scale, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Take the masked scores / scale (BM, BN) of one key tile into the online softmax of one row tile."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # A row that has seen no key yet: -inf - -inf would be NaN.
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new * (scale * LOG2_E))
    b_p = tl.exp2(b_s * (scale * LOG2_E) - b_safe[:, None])
    b_scale = tl.exp2(b_max * (scale * LOG2_E) - b_safe)
    b_sum = b_sum * b_scale + tl.sum(b_p, 1)
    # (BM, BN) @ (BN, BD) -> (BM, BD)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_scale[:, None], input_precision=PRECISION, out_dtype=ACC)
    return b_acc, b_new, b_sum


@triton.jit
def softmax_result(b_acc, b_max, b_sum, sees, scale):
    """(output, natural log-sum-exp) of a row tile; 0 and -inf in rows that do not see."""
    sees = sees & (b_sum > 0)
    b_sum = tl.where(sees, b_sum, 1.0)
    b_inverse = tl.where(sees, 1.0 / b_sum, 0.0)  # once a row: a division costs ten multiplications
    b_lse = tl.where(sees, b_max * scale + tl.log(b_sum), float("-inf"))
    return b_acc * b_inverse[:, None], b_lse


@triton.jit
def score_gradient(b_s, b_dp, b_lse, b_delta, scale):
    """(P, dS / scale) from masked scores S / scale, dP, and statistics that broadcast against them (LSE in base 2)."""
    b_p = tl.exp2(b_s * (scale * LOG2_E) - b_lse)
    return b_p, b_p * (b_dp - b_delta)


@triton.jit
def query_gradient_step(b_dq, b_s, b_dp, b_k, b_lse, b_delta, scale, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Add what one key tile, with masked scores / scale (BM, BN), gives to dQ / scale of one row tile."""
    _, b_ds = score_gradient(b_s, b_dp, b_lse, b_delta, scale)
    # (BM, BN) @ (BN, BD) -> (BM, BD)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def key_gradient_step(
    b_dk, b_dv, b_s, b_dp, b_q, b_do, b_lse, b_delta, scale, ACC: tl.constexpr, PRECISION: tl.constexpr
):
    """Add what one row tile gives to dK / scale and dV of one key tile; scores / scale transposed, (BN, BM)."""
    b_p, b_ds = score_gradient(b_s, b_dp, b_lse, b_delta, scale)
    # (BN, BM) @ (BM, BD) -> (BN, BD)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION, out_dtype=ACC)
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION, out_dtype=ACC)
    return b_dk, b_dv
