"""What the attention kernels do with tiles in registers, whoever sees whom: `@triton.jit` functions only.

Names: D head size, BD = D padded to a power of two; BM query rows and BN keys of a tile. m_ mask, p_ pointers, b_ block
in registers. `m_visible` broadcasts against the scores, and is read only where MASKED.

Statistics are those of softmax in base 2: P = 2^(S * scale * log2 e - LSE * log2 e); the LSE in memory is natural.
"""

import triton
import triton.language as tl

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
def signed_queries(b_q, SCALE: tl.constexpr):
    """Q times the sign of SCALE: the running maximum is that of unscaled scores, right for a positive scale only."""
    if SCALE < 0:
        b_q = -b_q
    elif SCALE == 0:
        b_q = tl.zeros_like(b_q)
    return b_q


@triton.jit
def softmax_step(
    b_acc, b_max, b_sum, b_q, b_k, b_v, m_visible,
    SCALE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take one key tile into the online softmax of one row tile; SCALE > 0."""
    # (BM, BD) @ (BD, BN) -> (BM, BN)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
    if MASKED:
        b_s = tl.where(m_visible, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_safe = b_new * (SCALE * LOG2_E)
    if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_safe)
    b_p = tl.exp2(b_s * (SCALE * LOG2_E) - b_safe[:, None])
    b_scale = tl.exp2(b_max * (SCALE * LOG2_E) - b_safe)
    b_sum = b_sum * b_scale + tl.sum(b_p, 1)
    # (BM, BN) @ (BN, BD) -> (BM, BD)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_scale[:, None], input_precision=PRECISION, out_dtype=ACC)
    return b_acc, b_new, b_sum


@triton.jit
def softmax_result(b_acc, b_max, b_sum, sees, SCALE: tl.constexpr):
    """(output, natural log-sum-exp) of a row tile; 0 and -inf in rows that do not see."""
    sees = sees & (b_sum > 0)
    b_sum = tl.where(sees, b_sum, 1.0)
    b_out = tl.where(sees[:, None], b_acc / b_sum[:, None], 0.0)
    b_lse = tl.where(sees, b_max * SCALE + tl.log(b_sum), float("-inf"))
    return b_out, b_lse


@triton.jit
def score_gradient(b_s, b_dp, b_lse, b_delta, m_visible, SCALE: tl.constexpr, MASKED: tl.constexpr):
    """(P, dS / SCALE) from scores S / SCALE, dP, and statistics that broadcast against them (LSE in base 2)."""
    b_p = tl.exp2(b_s * (SCALE * LOG2_E) - b_lse)
    if MASKED:
        b_p = tl.where(m_visible, b_p, 0.0)
    return b_p, b_p * (b_dp - b_delta)


@triton.jit
def query_gradient_step(
    b_dq, b_q, b_do, b_lse, b_delta, b_k, b_v, m_visible,
    SCALE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what one key tile gives to dQ / SCALE of one row tile."""
    # (BM, BD) @ (BD, BN) -> (BM, BN)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACC)
    _, b_ds = score_gradient(b_s, b_dp, b_lse[:, None], b_delta[:, None], m_visible, SCALE, MASKED)
    # (BM, BN) @ (BN, BD) -> (BM, BD)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def key_gradient_step(
    b_dk, b_dv, b_k, b_v, b_q, b_do, b_lse, b_delta, m_visible,
    SCALE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what one row tile gives to dK / SCALE and dV of one key tile; all products transposed, (BN, BM)."""
    # (BN, BD) @ (BD, BM) -> (BN, BM)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION, out_dtype=ACC)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION, out_dtype=ACC)
    b_p, b_ds = score_gradient(b_s, b_dp, b_lse[None, :], b_delta[None, :], m_visible, SCALE, MASKED)
    # (BN, BM) @ (BM, BD) -> (BN, BD)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION, out_dtype=ACC)
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION, out_dtype=ACC)
    return b_dk, b_dv
