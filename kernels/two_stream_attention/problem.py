"""What a backend of two-stream attention is given: a pair of streams, and the sizes and options of one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Sizes and options of one call."""

    tokens: int  # N
    targets: int  # T; with one cut per image, the rows kept for targets
    cut: int | Tensor  # c, or int64 (B,)
    mask_tokens: bool  # whether rows and keys M exist (MaPeT) or not (PIM)
    scale: float

    @property
    def content_rows(self) -> int:
        """Rows of the content stream and keys: N + T, or N without mask tokens."""
        return self.tokens + (self.targets if self.mask_tokens else 0)


@dataclass(frozen=True)
class Streams:
    """Content rows A, B(, M) and query rows G of one quantity: (B, rows, H, D), or statistics (B, rows, H).

    `content` is None in the last block, where only the query stream is wanted.
    """

    content: Tensor | None
    query: Tensor

    def empty_like(self) -> Streams:
        """Uninitialised streams of the same shapes."""
        return Streams(None if self.content is None else torch.empty_like(self.content), torch.empty_like(self.query))


def split_flat(flat: Tensor, batch: int, problem: Problem, with_content: bool) -> Streams:
    """Views of a flat buffer (B * content_rows + B * T, ...), or (B * T, ...) without content, as streams."""
    boundary = batch * problem.content_rows if with_content else 0
    content = flat[:boundary].unflatten(0, (batch, problem.content_rows)) if with_content else None
    return Streams(content, flat[boundary:].unflatten(0, (batch, problem.targets)))
