"""Launches of the permuted embedding's Triton kernels: one pass over the pixels, one over the buffer.

The functions mirror reference.py. The position gradient sums over images in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mapet_kernels.permuted_embed import kernel
from mapet_kernels.permuted_embed.buffer import Buffer, all_gradients, empty_patches
from mapet_kernels.triton_launch import on_device

GRADIENT_BLOCK = 64
"""Columns of one program of the position gradient: narrow, so that N * D / 64 programs fill the device."""


def permuted_patches(
    images: Tensor, patches: Tensor, patch_size: int, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See reference.permuted_patches."""
    batch, rows = patches.shape
    out = empty_patches(images, patches, patch_size, dtype)
    columns = out.shape[2]
    with on_device(images.device):
        kernel.permuted_patches_kernel[(batch * rows,)](
            images, patches.contiguous(), out, mean, std, *images.stride(), rows, images.shape[2] // patch_size,
            PATCH=patch_size, COLUMNS=columns, BLOCK=triton.next_power_of_2(columns),
            IS_UINT8=images.dtype == torch.uint8, NORMALISE=mean is not None, WORK=_work(dtype), num_warps=4,
        )  # fmt: skip
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
    has_class, width = class_token is not None, content.shape[2]
    buffer = Buffer(*perm.shape, content.shape[1] + has_class, cut, has_class, mask_tokens, query_stream)
    out = torch.empty(buffer.rows, width, dtype=content.dtype, device=content.device)
    with on_device(content.device):
        kernel.assemble_kernel[(buffer.images * (buffer.ranks + buffer.targets),)](
            content.contiguous(), pos_embed.contiguous(), mask_token.contiguous(),
            None if class_token is None else class_token.contiguous(), perm.contiguous(), out,
            buffer.images, buffer.tokens, buffer.ranks, cut, buffer.content_rows, width,
            HAS_CLASS=has_class, MASK_TOKENS=mask_tokens, QUERY_STREAM=query_stream,
            BD=triton.next_power_of_2(width), num_warps=_warps(width),
        )  # fmt: skip
    return out


def assemble_backward(
    d_rows: Tensor, perm: Tensor, cut: int, patches: int, class_token: bool, mask_tokens: bool, query_stream: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.assemble_backward."""
    buffer = Buffer(*perm.shape, patches + int(class_token), cut, class_token, mask_tokens, query_stream)
    width = d_rows.shape[1]
    block = min(GRADIENT_BLOCK, triton.next_power_of_2(width))

    def position_gradient(rank_of: Tensor, d_position: Tensor, d_masked: Tensor) -> None:
        with on_device(d_rows.device):
            kernel.assemble_position_gradient_kernel[(buffer.tokens, triton.cdiv(width, block))](
                d_rows, rank_of, d_position, d_masked,
                buffer.images, buffer.tokens, buffer.ranks, cut, buffer.content_rows, width,
                MASK_TOKENS=mask_tokens, QUERY_STREAM=query_stream, BD=block, WORK=_work(d_rows.dtype), num_warps=1,
            )  # fmt: skip

    return all_gradients(d_rows, perm, buffer, position_gradient)


def _work(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _warps(width: int) -> int:
    return 1 if width <= 256 else 4
