"""A uniform sample of patches from a stream whose length nobody knows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Reservoir:
    """At most `capacity` rows, each row seen equally likely to be among them (algorithm R, Vitter 1985).

    The sample depends on the seed and the order of the rows, not on how they come in batches. Rows stay on the CPU in
    the dtype they came in.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.seen = capacity, 0
        self._random = np.random.default_rng(seed)
        self._buffer: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """(min(seen, capacity), F): the sample so far."""
        if self._buffer is None:
            return torch.empty(0, 0)
        return self._buffer[: min(self.seen, self.capacity)]

    def add(self, rows: Tensor) -> None:
        """Offer rows (n, F)."""
        numbers = np.arange(self.seen, self.seen + len(rows))
        # Row t goes to slot t while there is room, then to a random one of t + 1, if that slot exists.
        drawn = (self._random.random(len(rows)) * (numbers + 1)).astype(np.int64)
        slots = np.where(numbers < self.capacity, numbers, drawn)
        # Of rows that meet in one slot the last one stays.
        slots, from_end = np.unique(slots[::-1], return_index=True)
        stays = slots < self.capacity
        self._reserve(min(self.seen + len(rows), self.capacity), rows)
        chosen = torch.from_numpy(len(rows) - 1 - from_end[stays])
        self._buffer[torch.from_numpy(slots[stays])] = rows[chosen.to(rows.device)].cpu()
        self.seen += len(rows)

    def _reserve(self, size: int, like: Tensor) -> None:
        if self._buffer is not None and len(self._buffer) >= size:
            return
        grown = torch.empty(min(max(2 * size, 4096), self.capacity), like.shape[1], dtype=like.dtype)
        if self._buffer is not None:
            grown[: len(self.rows)] = self.rows
        self._buffer = grown
