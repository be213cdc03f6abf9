"""Patchify, permute, embed and assemble the flat token buffer in plain torch.

Rows of the buffer, for images b = 0..B-1 and a permutation with token perm[b, r] at rank r:

    content stream, per image:  A   z_r + pos[perm[b, r]]                  r < c
                                B   z_r + pos[perm[b, r]]                  r >= c, where targets are kept (not MIM)
                                M   mask_token + pos[perm[b, c + i]]       i < T, where there are mask tokens (not PIM)
    query stream, per image:    G   mask_token + pos[perm[b, c + i]]       i < T, where there is one (not MIM)

with z_r the class token at rank 0, if there is one, and else the projected patch of token perm[b, r].
"""

from __future__ import annotations

import torch
from torch import Tensor


def permuted_patches(
    images: Tensor, patches: Tensor, patch_size: int, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Normalised patches (B, R, 3 * p * p) of images (B, 3, S, S) in the order of `patches` (B, R), raster indices."""
    batch, channels, size, _ = images.shape
    grid = size // patch_size
    tiles = images.view(batch, channels, grid, patch_size, grid, patch_size)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid * grid, channels, patch_size * patch_size)
    rows = torch.arange(batch, device=images.device).unsqueeze(1)
    chosen = tiles[rows, patches]  # (B, R, 3, p * p)
    work = torch.promote_types(dtype, torch.float32)
    chosen = chosen.to(work) / 255 if images.dtype == torch.uint8 else chosen.to(work)
    if mean is not None and std is not None:
        chosen = (chosen - mean.to(work).unsqueeze(1)) / std.to(work).unsqueeze(1)
    return chosen.flatten(2).to(dtype)


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
    """Flat buffer (rows, D) from projected patches `content` (B, R, D) in permuted order; see the top of the file."""
    batch, _, width = content.shape
    if class_token is not None:
        content = torch.cat([class_token.expand(batch, 1, width), content], dim=1)
    content = content + pos_embed[perm[:, : content.shape[1]]]
    masked = mask_token + pos_embed[perm[:, cut:]]  # (B, T, D)
    if mask_tokens:
        content = torch.cat([content, masked], dim=1)
    rows = content.flatten(0, 1)
    return torch.cat([rows, masked.flatten(0, 1)]) if query_stream else rows


def assemble_backward(
    d_rows: Tensor, perm: Tensor, cut: int, patches: int, class_token: bool, mask_tokens: bool, query_stream: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of content (B, R, D), pos_embed (N, D), mask_token (D,) and class_token (D,; empty without one)."""
    batch, tokens = perm.shape
    width, targets = d_rows.shape[1], tokens - cut
    ranks = patches + int(class_token)
    content_rows = ranks + (targets if mask_tokens else 0)
    d_content = d_rows[: batch * content_rows].view(batch, content_rows, width)
    d_masked = d_rows.new_zeros(batch, targets, width)
    if mask_tokens:
        d_masked = d_masked + d_content[:, ranks:]
    if query_stream:
        d_masked = d_masked + d_rows[batch * content_rows :].view(batch, targets, width)
    # Every token has one rank, so summing over images after a gather by rank is a sum in a fixed order.
    by_rank = torch.nn.functional.pad(d_content[:, :ranks], (0, 0, 0, tokens - ranks))
    by_rank = torch.cat([by_rank[:, :cut], by_rank[:, cut:] + d_masked], dim=1)
    rank_of = perm.argsort(dim=1)
    d_pos = by_rank.gather(1, rank_of.unsqueeze(-1).expand(-1, -1, width)).sum(0)
    d_class = d_content[:, 0].sum(0) if class_token else d_rows.new_empty(0)
    # A custom op must return no view of its inputs, and .contiguous() may be one.
    d_patches = d_content[:, int(class_token) : ranks].clone(memory_format=torch.contiguous_format)
    return d_patches, d_pos, d_masked.sum((0, 1)), d_class
