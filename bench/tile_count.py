"""How many tiles the attention kernels go through, with and without a mask: from who sees whom and the tile sizes.

Row slots and keys stand in the kernels' order. A tile has a mask unless all its rows see all its keys; rows that see
nothing and rows that do not exist do not matter in the kernels that go over keys. What is here restates how the kernels
cut rows and keys into tiles; tests/test_tile_count.py holds it to the kernels themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mapet_kernels.visibility import prefix_suffix_mask, two_stream_visibility


@dataclass(frozen=True)
class Tiles:
    """What the programs of one image and head do together.

    passing: rows of the operands that pass by and are loaded: keys that exist, or rows that see (dK and dV).
    staying: rows of the operands and results that stay with a program.
    """

    programs: int
    plain: int
    masked: int
    passing: int
    staying: int

    @property
    def count(self) -> int:
        """All tiles."""
        return self.plain + self.masked


def two_stream_rows(tokens: int, cut: int, *, mask_tokens: bool, with_content: bool) -> tuple[np.ndarray, np.ndarray]:
    """Who sees whom, keys in the order M, A, B: bool (rows with shift 0: A and M, keys) and (2, T, keys) of B and G.

    Without content rows the first has no rows and the second is (1, T, keys), of G.
    """
    content, query = (x.numpy() for x in two_stream_visibility(tokens, cut, mask_tokens=mask_tokens))
    content, query = (np.concatenate([x[:, tokens:], x[:, :tokens]], 1) for x in (content, query))
    if not with_content:
        return content[:0], query[None]
    return np.concatenate([content[:cut], content[tokens:]]), np.stack([content[cut:tokens], query])


def two_stream_by_row(first: np.ndarray, targets: np.ndarray, rows: int, keys: int) -> Tiles:
    """Of the forward and dQ kernels: a program has `rows` first rows, or B and G of as many targets as fit."""
    together = rows // len(targets)
    tiles = [first[i : i + rows] for i in range(0, len(first), rows)]
    tiles += [targets[:, i : i + together].reshape(-1, targets.shape[2]) for i in range(0, targets.shape[1], together)]
    return _over_keys(tiles, keys)


def _over_keys(tiles: list[np.ndarray], keys: int) -> Tiles:
    """Programs that each go over the keys that any of their rows sees, without gaps, in blocks from the first on."""
    plain = masked = passing = 0
    for seen in tiles:
        whole = seen[seen.any(1)].all(0)[seen.any(0)]
        full = sum(whole[i : i + keys].all() for i in range(0, len(whole) - keys + 1, keys))
        plain, masked, passing = plain + full, masked + -(-len(whole) // keys) - full, passing + len(whole)
    return Tiles(len(tiles), int(plain), int(masked), passing, sum(map(len, tiles)))


def two_stream_by_key(first: np.ndarray, targets: np.ndarray, rows: int, keys: int) -> Tiles:
    """Of the dK and dV kernel: a program has `keys` keys and goes over the first rows, then over targets."""
    together = rows // len(targets)
    count = first.shape[1]
    plain = masked = passing = 0
    for p in range(0, count, keys):
        seen_first, seen_targets = first[:, p : p + keys], targets[:, :, p : p + keys]
        blocks = [seen_first[i : i + rows] for i in range(0, len(first), rows)] if seen_first.any() else []
        some = np.flatnonzero(seen_targets.any((0, 2)))
        if len(some):
            seen = seen_targets[:, some[0] : some[-1] + 1]
            blocks += [seen[:, i : i + together].reshape(-1, seen.shape[2]) for i in range(0, seen.shape[1], together)]
        full = sum(block.all() and block.shape == (rows, keys) for block in blocks)
        plain, masked, passing = plain + full, masked + len(blocks) - full, passing + sum(map(len, blocks))
    return Tiles(-(-count // keys), int(plain), int(masked), passing, count)


def prefix_suffix_rows(shift: np.ndarray, cut: int, content: int, suffix: int) -> np.ndarray:
    """Who sees whom: bool (rows, content + suffix keys)."""
    return prefix_suffix_mask(torch.from_numpy(shift), cut, content, suffix).numpy()


def prefix_suffix_by_row(seen: np.ndarray, rows: int, keys: int) -> Tiles:
    """Of the forward and dQ kernels of prefix-suffix attention, given who sees whom in the order of its rows."""
    return _over_keys([seen[i : i + rows] for i in range(0, len(seen), rows)], keys)


def prefix_suffix_by_key(seen: np.ndarray, rows: int, keys: int) -> Tiles:
    """Of the dK and dV kernel of prefix-suffix attention: a program takes the row tiles that see any of its keys."""
    plain = masked = passing = 0
    for p in range(0, seen.shape[1], keys):
        blocks = [seen[i : i + rows, p : p + keys] for i in range(0, len(seen), rows)]
        blocks = [block for block in blocks if block.any()]
        full = sum(block.all() and len(block) == rows for block in blocks)
        plain, masked, passing = plain + full, masked + len(blocks) - full, passing + sum(map(len, blocks))
    return Tiles(-(-seen.shape[1] // keys), int(plain), int(masked), passing, seen.shape[1])
