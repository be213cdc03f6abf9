"""Launches of the CUDA C++ kernels of the permuted embedding (csrc/), which MAPET_BUILD_CUDA=1 builds.

The functions mirror reference.py. The position gradient sums over images in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapet_kernels import _C  # noqa: F401  (loads the operators)
from mapet_kernels.permuted_embed.buffer import Buffer, all_gradients, empty_patches


def permuted_patches(
    images: Tensor, patches: Tensor, patch_size: int, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See reference.permuted_patches."""
    work = torch.promote_types(dtype, torch.float32)
    # Of floating-point images the kernels take one type, that of the arithmetic; others are rare, and copied.
    images = images if images.dtype == torch.uint8 else images.to(work)
    mean, std = (None if x is None else x.to(work).contiguous() for x in (mean, std))
    out = empty_patches(images, patches, patch_size, dtype)
    torch.ops.mapet_kernels.cuda_permuted_patches(images, patches.contiguous(), out, mean, std, patch_size)
    return out


def assemble(
    content: Tensor,
    pos_embed: Tensor,
    mask_token: Tensor,
    class_token: Tensor | None,
    perm: Tensor,
    cut: int,
    mask_tokens: bool,
    query_stream: bool,
) -> Tensor:
    """See reference.assemble."""
    has_class = class_token is not None
    buffer = Buffer(*perm.shape, content.shape[1] + has_class, cut, has_class, mask_tokens, query_stream)
    out = torch.empty(buffer.rows, content.shape[2], dtype=content.dtype, device=content.device)
    torch.ops.mapet_kernels.cuda_assemble_streams(
        content.contiguous(), pos_embed.contiguous(), mask_token.contiguous(),
        None if class_token is None else class_token.contiguous(), perm.contiguous(), out,
        cut, mask_tokens, query_stream,
    )  # fmt: skip
    return out


def assemble_backward(
    d_rows: Tensor, perm: Tensor, cut: int, patches: int, class_token: bool, mask_tokens: bool, query_stream: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.assemble_backward."""
    buffer = Buffer(*perm.shape, patches + int(class_token), cut, class_token, mask_tokens, query_stream)

    def position_gradient(rank_of: Tensor, d_position: Tensor, d_masked: Tensor) -> None:
        torch.ops.mapet_kernels.cuda_assemble_position_gradient(
            d_rows, rank_of, d_position, d_masked, buffer.ranks, cut, mask_tokens, query_stream
        )

    return all_gradients(d_rows, perm, buffer, position_gradient)
