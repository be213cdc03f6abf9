"""What the backends with kernels share: the buffer's sizes, and the gradients around the position gradient's kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Buffer:
    """Sizes of the flat token buffer.

    images, tokens, cut: B, N, c.
    ranks: content rows of an image without mask tokens, the class token included: N, or c without target content.
    """

    images: int
    tokens: int
    ranks: int
    cut: int
    class_token: bool
    mask_tokens: bool
    query_stream: bool

    @property
    def targets(self) -> int:
        """T."""
        return self.tokens - self.cut

    @property
    def content_rows(self) -> int:
        """Rows of an image in the content stream."""
        return self.ranks + (self.targets if self.mask_tokens else 0)

    @property
    def rows(self) -> int:
        """All rows."""
        return self.images * (self.content_rows + (self.targets if self.query_stream else 0))


def empty_patches(images: Tensor, patches: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    """Room for the result of permuted_patches, (B, R, 3 * p * p)."""
    return torch.empty(*patches.shape, images.shape[1] * patch_size**2, dtype=dtype, device=images.device)


def all_gradients(
    d_rows: Tensor, perm: Tensor, buffer: Buffer, position_gradient: Callable[[Tensor, Tensor, Tensor], None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients as reference.assemble_backward returns them, from a contiguous `d_rows` (rows, D).

    Args:
        position_gradient: called with rank_of (B, N), the rank of each token, and to be filled d_position (N, D), sums
            over all rows of a token, and d_masked (N, D), over those of its mask tokens, in float32 or wider.
    """
    width, work = d_rows.shape[1], torch.promote_types(d_rows.dtype, torch.float32)
    d_position = d_rows.new_empty(buffer.tokens, width)
    d_masked = d_rows.new_empty(buffer.tokens, width, dtype=work)
    order = torch.arange(buffer.tokens, device=perm.device).expand_as(perm)
    # A perm out of range would end the process on a GPU, where it was not checked.
    rank_of = torch.empty_like(perm, memory_format=torch.contiguous_format)
    rank_of.scatter_(1, perm.clamp(0, buffer.tokens - 1), order)
    position_gradient(rank_of, d_position, d_masked)
    d_content = d_rows[: buffer.images * buffer.content_rows].view(buffer.images, buffer.content_rows, width)
    # A custom op must return no view of its inputs. Token 0 is the class token where there is one, and never a target.
    d_patches = d_content[:, int(buffer.class_token) : buffer.ranks].clone(memory_format=torch.contiguous_format)
    d_class = d_position[0].clone() if buffer.class_token else d_rows.new_empty(0)
    return d_patches, d_position, d_masked.sum(0).to(d_rows.dtype), d_class
