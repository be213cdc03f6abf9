"""The layout of the flat token buffer: which rows exist, and which images they belong to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StreamLayout:
    """Row groups of the flat buffer for one objective; see `mapet_kernels.visibility` for A, B, M and G.

    The content streams of all images come first, batch * content_rows rows; then the query streams, batch * query_rows.
    """

    batch: int
    tokens: int  # N
    cut: int  # c, the rows A
    target_content: bool  # rows B: MaPeT and PIM
    mask_tokens: bool  # rows M: MaPeT and MIM
    query_stream: bool  # rows G: MaPeT and PIM

    @property
    def targets(self) -> int:
        """T, predicted tokens of an image."""
        return self.tokens - self.cut

    @property
    def content_rows(self) -> int:
        """Content rows of an image: A, then B and M where they exist. Keys and values come from these."""
        return self.cut + self.targets * (int(self.target_content) + int(self.mask_tokens))

    @property
    def query_rows(self) -> int:
        """Query-stream rows of an image."""
        return self.targets if self.query_stream else 0

    @property
    def rows(self) -> int:
        """Rows of the whole buffer."""
        return self.batch * (self.content_rows + self.query_rows)

    def groups(self, predicted_only: bool) -> tuple[int, ...]:
        """Rows of an image in each part of the buffer, or of its predicted rows; a part holds all images in turn."""
        if predicted_only:
            return (self.targets,)
        return (self.content_rows, self.query_rows) if self.query_rows else (self.content_rows,)

    def content(self, x: Tensor) -> Tensor:
        """The content streams of a buffer (rows, ...), a view (batch * content_rows, ...)."""
        return x[: self.batch * self.content_rows]

    def predicted(self, x: Tensor) -> Tensor:
        """The rows that predict, (batch * targets, ...) by image, then target: G, or M without a query stream."""
        if self.query_stream:
            return x[self.batch * self.content_rows :]
        by_image = x.unflatten(0, (self.batch, self.content_rows))
        return by_image[:, self.content_rows - self.targets :].flatten(0, 1)

    def per_row(self, per_image: Tensor, predicted_only: bool) -> Tensor:
        """One number per image (batch,) repeated for its rows: (rows, 1), or (batch * targets, 1)."""
        if predicted_only:
            return per_image.repeat_interleave(self.targets).unsqueeze(1)
        content = per_image.repeat_interleave(self.content_rows)
        return torch.cat([content, per_image.repeat_interleave(self.query_rows)]).unsqueeze(1)
