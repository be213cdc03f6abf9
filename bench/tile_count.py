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


@dataclass(frozen=True)
class TwoStream:
    """Who sees whom in two-stream attention, keys in the order M, A, B.

    first: bool (rows A and M, keys); no rows without content queries (last block).
    targets: bool (2, T, keys), of B and G. Without content queries there are no rows B, but the kernels go by what both
        would see: a key or row more at an edge.
    """

    first: np.ndarray
    targets: np.ndarray
    with_content: bool

    @property
    def streams(self) -> int:
        """Rows of one target."""
        return 2 if self.with_content else 1

    @property
    def rows(self) -> int:
        return len(self.first) + self.streams * self.targets.shape[1]

    @property
    def pairs(self) -> int:
        """Of a row and a key that it sees."""
        return int(self.first.sum() + self.targets[-self.streams :].sum())


def two_stream(tokens: int, cut: int, *, mask_tokens: bool = True, with_content: bool = True) -> TwoStream:
    """Two-stream attention at these sizes."""
    content, query = (x.numpy() for x in two_stream_visibility(tokens, cut, mask_tokens=mask_tokens))
    content, query = (np.concatenate([x[:, tokens:], x[:, :tokens]], 1) for x in (content, query))
    first = np.concatenate([content[:cut], content[tokens:]]) if with_content else content[:0]
    return TwoStream(first, np.stack([content[cut:tokens], query]), with_content)


def two_stream_by_row(x: TwoStream, rows: int, keys: int) -> Tiles:
    """Of the forward and dQ kernels: a program has `rows` first rows, or as many rows of targets, B and G together."""
    tiles = [x.first[i : i + rows] for i in range(0, len(x.first), rows)]
    return _over_keys(
        [*tiles, *(tile.reshape(-1, tile.shape[2]) for tile in _target_tiles(x, x.targets, rows))], keys, x.rows
    )


def _target_tiles(x: TwoStream, targets: np.ndarray, rows: int) -> list[np.ndarray]:
    """Targets (2, T, keys) cut into tiles of `rows` rows."""
    together = rows // x.streams
    return [targets[:, i : i + together] for i in range(0, targets.shape[1], together)]


def _over_keys(tiles: list[np.ndarray], keys: int, rows: int) -> Tiles:
    """Programs that each go over the keys that any of their rows sees, without gaps, in blocks from the first on."""
    plain = masked = passing = 0
    for seen in tiles:
        whole = seen[seen.any(1)].all(0)[seen.any(0)]
        full = sum(whole[i : i + keys].all() for i in range(0, len(whole) - keys + 1, keys))
        plain, masked, passing = plain + full, masked + -(-len(whole) // keys) - full, passing + len(whole)
    return Tiles(len(tiles), int(plain), int(masked), passing, rows)


def two_stream_by_key(x: TwoStream, rows: int, keys: int) -> Tiles:
    """Of the dK and dV kernel: a program has `keys` keys and goes over the first rows, then over targets."""
    count = x.targets.shape[2]
    plain = masked = passing = 0
    for p in range(0, count, keys):
        first, targets = x.first[:, p : p + keys], x.targets[:, :, p : p + keys]
        whole_keys = first.shape[1] == keys
        blocks = [first[i : i + rows] for i in range(0, len(first), rows)] if first.any() else []
        some = np.flatnonzero(targets.any((0, 2)))
        pairs = _target_tiles(x, targets[:, some[0] : some[-1] + 1], rows) if len(some) else []
        full = sum(block.all() and len(block) == rows for block in blocks)
        full += sum(block.all() and block.shape[1] == rows // x.streams for block in pairs)
        full *= whole_keys
        plain, masked = plain + full, masked + len(blocks) + len(pairs) - full
        passing += sum(map(len, blocks)) + x.streams * sum(block.shape[1] for block in pairs)
    return Tiles(-(-count // keys), int(plain), int(masked), passing, count)


def prefix_suffix_rows(shift: np.ndarray, cut: int, content: int, suffix: int) -> np.ndarray:
    """Who sees whom: bool (rows, content + suffix keys)."""
    return prefix_suffix_mask(torch.from_numpy(shift), cut, content, suffix).numpy()


def prefix_suffix_by_row(seen: np.ndarray, rows: int, keys: int) -> Tiles:
    """Of the forward and dQ kernels of prefix-suffix attention, given who sees whom in the order of its rows."""
    return _over_keys([seen[i : i + rows] for i in range(0, len(seen), rows)], keys, len(seen))


def prefix_suffix_by_key(seen: np.ndarray, rows: int, keys: int) -> Tiles:
    """Of the dK and dV kernel of prefix-suffix attention: a program takes the row tiles that see any of its keys."""
    plain = masked = passing = 0
    for p in range(0, seen.shape[1], keys):
        blocks = [seen[i : i + rows, p : p + keys] for i in range(0, len(seen), rows)]
        blocks = [block for block in blocks if block.any()]
        full = sum(block.all() and len(block) == rows for block in blocks)
        plain, masked, passing = plain + full, masked + len(blocks) - full, passing + sum(map(len, blocks))
    return Tiles(-(-seen.shape[1] // keys), int(plain), int(masked), passing, seen.shape[1])
