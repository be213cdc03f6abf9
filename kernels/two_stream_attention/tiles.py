"""Which tiles the Triton kernels of two-stream attention visit: their own arithmetic, for choices and for counting.

Rows x and keys p are in the order of kernel.py, in which every tile of rows sees one range of keys, and every tile of
keys is seen by one range of rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

ROW_STEP = 4
"""Ranges of rows start at multiples of it, so that statistics are moved 16 bytes at a time."""


@dataclass(frozen=True)
class Shape:
    """One image and head: N, the cut, whether there are content queries, and mask tokens."""

    tokens: int
    cut: int
    with_content: bool = True
    mask_tokens: bool = True

    @property
    def targets(self) -> int:
        return self.tokens - self.cut

    @property
    def window(self) -> int:
        """Keys that a row with s = 0 sees, and with content queries the number of these rows."""
        return self.tokens if self.mask_tokens else self.cut

    @property
    def rows(self) -> int:
        return self.window + 2 * self.targets if self.with_content else self.targets

    @property
    def keys(self) -> int:
        return self.tokens + (self.targets if self.mask_tokens else 0)

    def shift(self, x: int) -> int:
        """Shift of row x."""
        return max(x - self.window + 1, 0) >> 1 if self.with_content else x

    def keys_of_rows(self, x0: int, x1: int) -> tuple[int, int, int, int]:
        """(lo, full_lo, full_hi, hi): some row of [x0, x1) sees each key of [lo, hi), all rows [full_lo, full_hi)."""
        least, most = self.shift(x0), self.shift(min(x1, self.rows) - 1)
        lo, full_lo = (least, most) if self.mask_tokens else (0, 0)
        return lo, full_lo, self.window + least, self.window + most

    def rows_of_keys(self, p0: int, p1: int) -> tuple[int, int, int, int]:
        """(lo, full_lo, full_hi, hi): rows of [lo, hi) see some key of [p0, p1), those of [full_lo, full_hi) all."""
        if self.with_content:
            lo = 0 if p0 < self.window else 2 * p0 - self.window + 1
            full_lo = 0 if p1 <= self.window else 2 * p1 - self.window - 1
            hi, full_hi = self.window + 2 * p1 - 1, self.window + 2 * p0 + 1
        else:
            lo, full_lo = max(p0 - self.window + 1, 0), max(p1 - self.window, 0)
            hi, full_hi = p1, p0 + 1
        if not self.mask_tokens:
            hi = full_hi = self.rows
        return lo, full_lo, min(full_hi, self.rows), min(hi, self.rows)


@dataclass(frozen=True)
class Visits:
    """Of one image and head: programs, tiles of scores that they compute, and how many masks are applied in these.

    A tile has one mask where keys before a row's window may be in it, another where keys after it may be.
    """

    programs: int
    tiles: int
    masks: int


def row_programs(shape: Shape, rows: int, keys: int) -> Visits:
    """Of the forward and dQ kernels, with tiles of `rows` x `keys`."""
    starts = range(0, shape.rows, rows)
    tiles = masks = 0
    for x0 in starts:
        lo, full_lo, full_hi, hi = shape.keys_of_rows(x0, x0 + rows)
        for p0 in range(lo, hi, keys):
            tiles += 1
            masks += (p0 < full_lo) + (p0 + keys > full_hi)
    return Visits(len(starts), tiles, masks)


def key_programs(shape: Shape, rows: int, keys: int, skipped: int) -> Visits:
    """Of the dK and dV kernel, whose first tile is short of `skipped` keys."""
    starts = range(-skipped, shape.keys, keys)
    tiles = masks = 0
    for p0 in starts:
        lo, full_lo, full_hi, hi = shape.rows_of_keys(max(p0, 0), p0 + keys)
        for x0 in range(lo // ROW_STEP * ROW_STEP, hi, rows):
            tiles += 1
            masks += (x0 < full_lo) + (x0 + rows > full_hi)
    return Visits(len(starts), tiles, masks)


@functools.lru_cache(maxsize=1024)
def fewest_visits(shape: Shape, rows: int, keys: int) -> int:
    """How many keys the first tile of the dK and dV kernel should be short of: no more programs, fewest tiles."""
    spare = -shape.keys % keys

    def cost(skipped: int) -> tuple[int, int]:
        visits = key_programs(shape, rows, keys, skipped)
        return visits.tiles, visits.masks

    return min(range(0, spare + 1, 8), key=cost)
