"""Triton kernels of the permuted embedding. Sizes: B images, N tokens, P patches, R rows kept, D width.

Indices that are read (patches, perm, rank_of) are brought into range: wrong ones give wrong numbers, and no access out
of bounds. Sizes that may change from step to step do not specialise the kernels.
"""

import triton
import triton.language as tl


@triton.jit
def _load_index(p, count):
    """The index at p, in [0, count) whatever is stored there."""
    return tl.minimum(tl.maximum(tl.load(p), 0), count - 1)


@triton.jit(do_not_specialize=["R", "GRID"])
def permuted_patches_kernel(
    p_images, p_patches, p_out, p_mean, p_std,
    stride_image, stride_channel, stride_y, stride_x,
    R, GRID,
    PATCH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, IS_UINT8: tl.constexpr, NORMALISE: tl.constexpr,
    WORK: tl.constexpr,
):  # fmt: skip
    """One row of (B, R, 3 * p * p): the patch of one image at one rank, colour-normalised."""
    i_row = tl.program_id(0).to(tl.int64)
    i_image = i_row // R
    patch = _load_index(p_patches + i_row, GRID * GRID)
    column = tl.arange(0, BLOCK)
    m_column = column < COLUMNS
    channel = (column // (PATCH * PATCH)).to(tl.int64)
    within = column % (PATCH * PATCH)
    y = (patch // GRID) * PATCH + within // PATCH
    x = (patch % GRID) * PATCH + within % PATCH
    o_pixel = i_image * stride_image + channel * stride_channel + y * stride_y + x * stride_x
    value = tl.load(p_images + o_pixel, mask=m_column, other=0).to(WORK)
    if IS_UINT8:
        value = value / 255
    if NORMALISE:
        mean = tl.load(p_mean + channel, mask=m_column, other=0.0).to(WORK)
        std = tl.load(p_std + channel, mask=m_column, other=1.0).to(WORK)
        value = (value - mean) / std
    tl.store(p_out + i_row * COLUMNS + column, value.to(p_out.dtype.element_ty), mask=m_column)


@triton.jit(do_not_specialize=["B", "N", "RANKS", "CUT", "CONTENT_ROWS"])
def assemble_kernel(
    p_content, p_position, p_mask_token, p_class_token, p_perm, p_out,
    B, N, RANKS, CUT, CONTENT_ROWS, D,
    HAS_CLASS: tl.constexpr, MASK_TOKENS: tl.constexpr, QUERY_STREAM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One content row, or the mask-token and query rows of one target, which are equal and so made once."""
    i_program = tl.program_id(0).to(tl.int64)
    programs = RANKS + N - CUT
    i_image, i = i_program // programs, i_program % programs
    column = tl.arange(0, BD)
    m_column = column < D
    if i < RANKS:
        token = _load_index(p_perm + i_image * N + i, N)
        if HAS_CLASS and i == 0:
            value = tl.load(p_class_token + column, mask=m_column, other=0.0)
        else:
            i_content = i_image * (RANKS - HAS_CLASS) + i - HAS_CLASS
            value = tl.load(p_content + i_content * D + column, mask=m_column, other=0.0)
        value = value + tl.load(p_position + token * D + column, mask=m_column, other=0.0)
        tl.store(p_out + (i_image * CONTENT_ROWS + i) * D + column, value, mask=m_column)
    else:
        i_target = i - RANKS
        token = _load_index(p_perm + i_image * N + CUT + i_target, N)
        value = tl.load(p_mask_token + column, mask=m_column, other=0.0)
        value = value + tl.load(p_position + token * D + column, mask=m_column, other=0.0)
        if MASK_TOKENS:
            tl.store(p_out + (i_image * CONTENT_ROWS + RANKS + i_target) * D + column, value, mask=m_column)
        if QUERY_STREAM:
            i_query = B * CONTENT_ROWS + i_image * (N - CUT) + i_target
            tl.store(p_out + i_query * D + column, value, mask=m_column)


@triton.jit(do_not_specialize=["B", "N", "RANKS", "CUT", "CONTENT_ROWS"])
def assemble_position_gradient_kernel(
    p_d_rows, p_rank_of, p_d_position, p_d_masked,
    B, N, RANKS, CUT, CONTENT_ROWS, D,
    MASK_TOKENS: tl.constexpr, QUERY_STREAM: tl.constexpr, BD: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Gradient of a token's position embedding, and its part for the mask token, summed over images in order."""
    i_token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    m_column = column < D
    b_position = tl.zeros((BD,), dtype=WORK)
    b_masked = tl.zeros((BD,), dtype=WORK)
    for i_image in range(0, B):
        o_image = i_image * tl.full((), 1, tl.int64)
        rank = _load_index(p_rank_of + o_image * N + i_token, N)
        if rank < RANKS:
            o_row = (o_image * CONTENT_ROWS + rank) * D
            b_position += tl.load(p_d_rows + o_row + column, mask=m_column, other=0.0).to(WORK)
        if rank >= CUT:
            if MASK_TOKENS:
                o_row = (o_image * CONTENT_ROWS + RANKS + rank - CUT) * D
                b_masked += tl.load(p_d_rows + o_row + column, mask=m_column, other=0.0).to(WORK)
            if QUERY_STREAM:
                o_row = (B * CONTENT_ROWS + o_image * (N - CUT) + rank - CUT) * D
                b_masked += tl.load(p_d_rows + o_row + column, mask=m_column, other=0.0).to(WORK)
    o_out = i_token * D + column
    tl.store(p_d_position + o_out, (b_position + b_masked).to(p_d_position.dtype.element_ty), mask=m_column)
    tl.store(p_d_masked + o_out, b_masked, mask=m_column)
