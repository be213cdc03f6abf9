"""Launches of the permuted embedding's Triton kernels: one pass over the pixels, one over the buffer.

The functions mirror reference.py. The position gradient sums over images in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mapet_kernels.permuted_embed import kernel
from mapet_kernels.triton_launch import on_device

GRADIENT_BLOCK = 64
"""Columns of one program of the position gradient: narrow, so that N * D / 64 programs fill the device."""


def permuted_patches(
    images: Tensor, patches: Tensor, patch_size: int, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See reference.permuted_patches."""
    batch, rows = patches.shape
    columns = images.shape[1] * patch_size**2
    out = torch.empty(batch, rows, columns, dtype=dtype, device=images.device)
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
    batch, tokens = perm.shape
    ranks, width = content.shape[1] + int(class_token is not None), content.shape[2]
    targets = tokens - cut
    content_rows = ranks + (targets if mask_tokens else 0)
    rows = batch * (content_rows + (targets if query_stream else 0))
    out = torch.empty(rows, width, dtype=content.dtype, device=content.device)
    with on_device(content.device):
        kernel.assemble_kernel[(batch * (ranks + targets),)](
            content.contiguous(), pos_embed.contiguous(), mask_token.contiguous(),
            None if class_token is None else class_token.contiguous(), perm.contiguous(), out,
            batch, tokens, ranks, cut, content_rows, width,
            HAS_CLASS=class_token is not None, MASK_TOKENS=mask_tokens, QUERY_STREAM=query_stream,
            BD=triton.next_power_of_2(width), num_warps=_warps(width),
        )  # fmt: skip
    return out


def assemble_backward(
    d_rows: Tensor, perm: Tensor, cut: int, patches: int, class_token: bool, mask_tokens: bool, query_stream: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.assemble_backward."""
    batch, tokens = perm.shape
    width, targets, ranks = d_rows.shape[1], tokens - cut, patches + int(class_token)
    content_rows = ranks + (targets if mask_tokens else 0)
    d_position = d_rows.new_empty(tokens, width)
    work = torch.promote_types(d_rows.dtype, torch.float32)
    d_masked = d_rows.new_empty(tokens, width, dtype=work)
    order = torch.arange(tokens, device=perm.device).expand_as(perm)
    rank_of = torch.empty_like(perm).scatter_(1, perm, order)
    block = min(GRADIENT_BLOCK, triton.next_power_of_2(width))
    with on_device(d_rows.device):
        kernel.assemble_position_gradient_kernel[(tokens, triton.cdiv(width, block))](
            d_rows, rank_of, d_position, d_masked, batch, tokens, ranks, cut, content_rows, width,
            MASK_TOKENS=mask_tokens, QUERY_STREAM=query_stream, BD=block, WORK=_work(d_rows.dtype), num_warps=1,
        )  # fmt: skip
    d_content = d_rows[: batch * content_rows].view(batch, content_rows, width)
    # A custom op must return no view of its inputs. Token 0 is the class token where there is one, and never a target.
    d_patches = d_content[:, int(class_token) : ranks].clone(memory_format=torch.contiguous_format)
    d_class = d_position[0].clone() if class_token else d_rows.new_empty(0)
    return d_patches, d_position, d_masked.sum(0).to(d_rows.dtype), d_class


def _work(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _warps(width: int) -> int:
    return 1 if width <= 256 else 4
