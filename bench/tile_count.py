"""How many tiles the kernels of two-stream attention go through, and how many masks they apply, by size.

tests/test_tile_count.py holds the counts to the kernels themselves, in Triton's interpreter, and to visibility.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from mapet_kernels.two_stream_attention.tiles import ROW_STEP, Shape


@dataclass(frozen=True)
class Tiles:
    """What the programs of one image and head do together.

    masks: how often each mask is applied: keys before the window of a row, then keys after it.
    passing: rows of the operands that pass by and are loaded: keys, or rows (dK and dV).
    staying: rows of the operands and results that stay with a program.
    """

    programs: int
    tiles: int
    masks: tuple[int, int]
    passing: int
    staying: int


def by_row(shape: Shape, rows: int, keys: int) -> Tiles:
    """Of the forward and dQ kernels: a program has `rows` rows, and goes over the keys that any of them sees."""
    tiles = before = after = passing = 0
    starts = range(0, shape.rows, rows)
    for x in starts:
        lo, full_lo, full_hi, hi = shape.keys_of_rows(x, x + rows)
        for p in range(lo, hi, keys):
            tiles, before, after = tiles + 1, before + (p < full_lo), after + (p + keys > full_hi)
        passing += max(hi - lo, 0)
    return Tiles(len(starts), tiles, (before, after), passing, shape.rows)


def by_key(shape: Shape, rows: int, keys: int, skipped: int) -> Tiles:
    """Of the dK and dV kernel: a program has `keys` keys, the first `skipped` fewer, and takes rows that see any."""
    tiles = before = after = passing = 0
    starts = range(-skipped, shape.keys, keys)
    for p in starts:
        lo, full_lo, full_hi, hi = shape.rows_of_keys(max(p, 0), p + keys)
        for x in range(lo // ROW_STEP * ROW_STEP, hi, rows):
            tiles, before, after = tiles + 1, before + (x + rows > full_hi), after + (x < full_lo)
            passing += min(rows, shape.rows - x)
    return Tiles(len(starts), tiles, (before, after), passing, shape.keys)
