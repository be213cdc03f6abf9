"""The peer: MaPeT's forward pass the way the official code organises it, on this project's weights.

Tokens stay in image order; the permutation exists only in additive fp32 masks (0 or -1e30), built for each image on the
CPU and copied for each head; every layer runs two dense attention passes, one a stream; nothing of the last block is
left out; the logits of all targets exist at once. Targets are in image order. The official code
builds its masks several times more slowly, so that ratios to what includes building them are lower bounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from mapet.model.vit import Block, MaskedTokenViT

BLOCKED = -1e30


def image_masks(permutation: Tensor, cut: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of one image from its permutation (N,): content (H, N + T, N + T), query (H, T, N + T), is_target (N,)."""
    tokens = permutation.numel()
    rank = torch.empty_like(permutation)
    rank[permutation] = torch.arange(tokens)
    is_target = rank >= cut
    target_rank = rank[is_target]
    reach = rank.clamp(min=cut - 1)  # non-targets see all non-targets
    content_rows = torch.cat(
        [
            rank.unsqueeze(0) <= reach.unsqueeze(1),
            (target_rank.unsqueeze(0) > reach.unsqueeze(1)) | ~is_target[:, None],
        ],
        dim=1,
    )
    mask_rows = torch.cat([~is_target, torch.ones_like(target_rank, dtype=torch.bool)]).expand(len(target_rank), -1)
    query_rows = torch.cat([rank[None] < target_rank[:, None], target_rank[None] >= target_rank[:, None]], dim=1)
    return (
        _additive(torch.cat([content_rows, mask_rows]), heads),
        _additive(query_rows, heads),
        is_target,
    )


def batch_masks(permutations: Tensor, cut: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`image_masks` of every image, collated: what the official data workers send for a batch."""
    content, query, is_target = zip(*(image_masks(p, cut, heads) for p in permutations), strict=True)
    return torch.stack(content), torch.stack(query), torch.stack(is_target)


def _additive(visible: Tensor, heads: int) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, BLOCKED).expand(heads, -1, -1)


class OfficialWay(nn.Module):
    """MaPeT's training forward pass over a MaskedTokenViT, organised as the official code does."""

    def __init__(self, model: MaskedTokenViT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        content_mask: Tensor,
        query_mask: Tensor,
        is_target: Tensor,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy. images (B, 3, S, S) normalised; masks of `batch_masks`; keep (depth, 2, B) or None."""
        model = self.model
        batch = images.shape[0]
        content = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
        if model.cls_token is not None:
            content = torch.cat([model.cls_token.expand(batch, -1, -1), content], dim=1)
        content = content + model.pos_embed
        positions = model.pos_embed.expand(batch, -1, -1)[is_target].view(batch, -1, content.shape[-1])
        query = model.mask_positional_token + positions
        content = torch.cat([content, query], dim=1)
        for i, block in enumerate(model.blocks):
            factors = (1.0, 1.0) if keep is None else (k.view(-1, 1, 1) for k in keep[i])
            content, query = _block(block, content, query, content_mask, query_mask, *factors)
        model.norm(content)
        logits = model.decoder(model.norm(query)).transpose(1, 2)  # (B, V, T)
        labels = tokens[is_target[:, is_target.shape[1] - tokens.shape[1] :]].view(batch, -1)
        return F.cross_entropy(logits, labels)


def _block(block: Block, content, query, content_mask, query_mask, keep1, keep2) -> tuple[Tensor, Tensor]:
    h, g = block.norm1(content), block.norm1(query)
    attended = [_attention(block.attn, rows, h, mask) for rows, mask in ((h, content_mask), (g, query_mask))]
    content = content + keep1 * (block.ls1.gamma * attended[0])
    query = query + keep1 * (block.ls1.gamma * attended[1])
    content = content + keep2 * (block.ls2.gamma * _mlp(block, content))
    query = query + keep2 * (block.ls2.gamma * _mlp(block, query))
    return content, query


def _mlp(block: Block, x: Tensor) -> Tensor:
    return block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def _attention(attn, rows: Tensor, content: Tensor, mask: Tensor) -> Tensor:
    batch, count, width = rows.shape
    q = attn.q(rows).reshape(batch, count, attn.heads, -1).permute(0, 2, 1, 3)
    k, v = attn.kv(content).reshape(batch, -1, 2, attn.heads, width // attn.heads).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1)) * (width // attn.heads) ** -0.5 + mask
    return attn.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, count, width))
