"""How many tiles the attention kernels go through, and how many masks they apply: from who sees whom and tile sizes.

tests/test_tile_count.py holds the counts to the kernels themselves, in Triton's interpreter, and to visibility.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mapet_kernels.two_stream_attention.tiles import ROW_STEP, Shape
from mapet_kernels.visibility import prefix_suffix_mask


@dataclass(frozen=True)
class Tiles:
    """What the programs of one image and head do together.

    masks: how often each mask is applied: keys before the window of a row, then keys after it; or one for both.
    passing: rows of the operands that pass by and are loaded: keys, or rows (dK and dV).
    staying: rows of the operands and results that stay with a program.
    """

    programs: int
    tiles: int
    masks: tuple[int, ...]
    passing: int
    staying: int


def prefix_suffix(shift: np.ndarray, cut: int, content: int, suffix: int) -> np.ndarray:
    """Who sees whom under the prefix-suffix rule: bool (rows, content + suffix keys)."""
    return prefix_suffix_mask(torch.from_numpy(shift), cut, content, suffix).numpy()


def two_stream_by_row(shape: Shape, rows: int, keys: int) -> Tiles:
    """Of the forward and dQ kernels: a program has `rows` rows, and goes over the keys that any of them sees."""
    tiles = before = after = passing = 0
    starts = range(0, shape.rows, rows)
    for x in starts:
        lo, full_lo, full_hi, hi = shape.keys_of_rows(x, x + rows)
        for p in range(lo, hi, keys):
            tiles, before, after = tiles + 1, before + (p < full_lo), after + (p + keys > full_hi)
        passing += max(hi - lo, 0)
    return Tiles(len(starts), tiles, (before, after), passing, shape.rows)


def two_stream_by_key(shape: Shape, rows: int, keys: int, skipped: int) -> Tiles:
    """Of the dK and dV kernel: a program has `keys` keys, the first `skipped` fewer, and takes rows that see any."""
    tiles = before = after = passing = 0
    starts = range(-skipped, shape.keys, keys)
    for p in starts:
        lo, full_lo, full_hi, hi = shape.rows_of_keys(max(p, 0), p + keys)
        for x in range(lo // ROW_STEP * ROW_STEP, hi, rows):
            tiles, before, after = tiles + 1, before + (x + rows > full_hi), after + (x < full_lo)
            passing += min(rows, shape.rows - x)
    return Tiles(len(starts), tiles, (before, after), passing, shape.keys)


def prefix_suffix_by_row(seen: np.ndarray, content: int, rows: int, keys: int) -> Tiles:
    """Of the forward and dQ kernels of prefix-suffix attention: keys that no row of a tile sees are left out.

    A tile has a mask unless all rows see it whole, and where content keys meet suffix keys.
    """
    tiles = masks = passing = 0
    starts = range(0, len(seen), rows)
    for x in starts:
        some = seen[x : x + rows].any(0)
        most, window = some[:content].sum(), some.sum()
        whole = seen[x : x + rows][seen[x : x + rows].any(1)].all(0)[some]
        all_before = np.append(whole[:most], False).argmin()
        all_after = window - np.append(whole[most:][::-1], False).argmin()
        for u in range(0, window, keys):
            tiles += 1
            masks += (u + keys > all_before and u < all_after) or u + keys > window
        passing += window
    return Tiles(len(starts), tiles, (int(masks),), int(passing), len(seen))


def prefix_suffix_by_key(seen: np.ndarray, rows: int, keys: int) -> Tiles:
    """Of the dK and dV kernel of prefix-suffix attention: a program takes the row tiles that see any of its keys."""
    tiles = masks = passing = 0
    starts = range(0, seen.shape[1], keys)
    for p in starts:
        blocks = [seen[x : x + rows, p : p + keys] for x in range(0, len(seen), rows)]
        blocks = [block for block in blocks if block.any()]
        tiles, passing = tiles + len(blocks), passing + sum(map(len, blocks))
        masks += sum(not (block.all() and len(block) == rows) for block in blocks)
    return Tiles(len(starts), tiles, (masks,), passing, seen.shape[1])
