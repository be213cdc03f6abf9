"""Two-stream attention by batched matrix products, a few images at a time, so that their scores stay in the caches.

What a CPU does best. With the keys laid out M, A, B every row sees one window of N keys (visibility.py):

    rows A and M                      keys [0, N)             no mask
    rows B and G of targets [i, j)    keys [i, N + j)         one mask (2 (j - i), N + j - i), the same for all tiles

so that a tile's products read slices of one (keys, D) matrix a head, and visit few keys that no row of theirs sees.
Without mask tokens (PIM) the windows start at 0: [0, c) for A, [0, c + j) for a tile.

    S = scale * Q K^T + mask      P = softmax(S)      O = P V
    dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(P * dP))      dQ = scale * dS K      dK = scale * dS^T Q

The backward pass computes P again, from S; no log-sum-exp is kept (it is 0). Scores and probabilities are in the dtype
of the inputs, the softmax uses fp32 inside, and what several tiles add to a key's gradient is added up in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mapet_kernels.two_stream_attention import by_cut
from mapet_kernels.two_stream_attention.problem import Problem, Streams
from mapet_kernels.two_stream_attention.tile_mask import tile_mask

TARGET_TILE = 75
"""Targets in a tile, at most: smaller tiles visit fewer masked keys, larger ones make fewer calls."""

ROW_TILE = 256
"""Rows A and M in a tile, at most."""

SCORE_BYTES = 16 << 20
"""Scores that exist at a time: what the caches of a few cores hold."""


def forward(q: Streams, k: Tensor, v: Tensor, out: Streams, lse: Streams, problem: Problem) -> None:
    """Fill `out` (B, rows, H, D), content rows in permuted order, and `lse` (B, rows, H) with 0."""
    if isinstance(problem.cut, Tensor):
        by_cut.forward(forward, q, k, v, out, lse, problem)
        return
    tiles = _tiles(q, problem)
    for images in _chunks(q.query, tiles):
        keys, values = _keys(k[images], problem), _keys(v[images], problem)
        for tile in tiles:
            p = tile.probabilities(tile.take(q, images, problem.scale), keys)
            tile.put(torch.bmm(p, values[:, tile.keys]), out, images)
    for part in (lse.content, lse.query):
        if part is not None:
            part.zero_()


def backward(
    d_out: Streams,
    q: Streams,
    k: Tensor,
    v: Tensor,
    out: Streams,
    lse: Streams,
    dq: Streams,
    dk: Tensor,
    dv: Tensor,
    problem: Problem,
) -> None:
    """Fill `dq` (content, query), `dk` and `dv`; `out` and `lse` are those of `forward`, and not read."""
    if isinstance(problem.cut, Tensor):
        by_cut.backward(backward, d_out, q, k, v, out, lse, dq, dk, dv, problem)
        return
    tiles = _tiles(q, problem)
    for images in _chunks(q.query, tiles):
        keys, values = _keys(k[images], problem), _keys(v[images], problem)
        # Several tiles add to one key's gradient, so it is kept in fp32 until the end.
        work = torch.promote_types(k.dtype, torch.float32)
        dk_sum, dv_sum = torch.zeros_like(keys, dtype=work), torch.zeros_like(values, dtype=work)
        for tile in tiles:
            rows, d_rows = tile.take(q, images, problem.scale), tile.take(d_out, images)
            p = tile.probabilities(rows, keys)
            dv_sum[:, tile.keys].add_(torch.bmm(p.transpose(1, 2), d_rows))
            dp = torch.bmm(d_rows, values[:, tile.keys].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dk_sum[:, tile.keys].add_(torch.bmm(ds.transpose(1, 2), rows))
            tile.put(torch.bmm(ds, keys[:, tile.keys]), dq, images, problem.scale)
        _put_keys(dk_sum, dk[images], problem)
        _put_keys(dv_sum, dv[images], problem)


@dataclass(frozen=True)
class Tile:
    """Rows that share a range of keys. Slices index the streams' rows and the keys M, A, B."""

    content: tuple[slice, ...]
    query: tuple[slice, ...]
    keys: slice
    bias: Tensor | None = None  # (rows, keys): what they see
    dead_row: int | None = None  # the one that can see nothing: G_0 without mask tokens and with cut 0

    @property
    def scores(self) -> int:
        """Pairs of a row and a key."""
        rows = sum(part.stop - part.start for part in (*self.content, *self.query))
        return rows * (self.keys.stop - self.keys.start)

    def parts(self, streams: Streams, images: slice) -> list[Tensor]:
        """Views (b, rows, H, D) of the tile's rows."""
        return [streams.content[images, rows] for rows in self.content] + [
            streams.query[images, rows] for rows in self.query
        ]

    def take(self, streams: Streams, images: slice, scale: float = 1.0) -> Tensor:
        """The tile's rows times scale, heads first: contiguous (b * H, rows, D)."""
        parts = self.parts(streams, images)
        b, _, heads, size = parts[0].shape
        taken = parts[0].new_empty(b, heads, sum(part.shape[1] for part in parts), size)
        for part, place in zip(parts, _split_like(taken, parts), strict=True):
            torch.mul(part.transpose(1, 2), scale, out=place)
        return taken.flatten(0, 1)

    def put(self, rows: Tensor, streams: Streams, images: slice, scale: float = 1.0) -> None:
        """Write rows (b * H, rows, D) times scale to where `take` found them."""
        parts = self.parts(streams, images)
        rows = rows.unflatten(0, (-1, streams.query.shape[2]))
        for part, place in zip(_split_like(rows, parts), parts, strict=True):
            torch.mul(part.transpose(1, 2), scale, out=place)

    def probabilities(self, rows: Tensor, keys: Tensor) -> Tensor:
        """(b * H, rows, keys of the tile) from its rows (b * H, rows, D) and all keys; 0 in a row that sees nothing."""
        keys = keys[:, self.keys].transpose(1, 2)
        if self.bias is None:
            return torch.bmm(rows, keys).softmax(-1)
        p = torch.baddbmm(self.bias.expand(rows.shape[0], -1, -1), rows, keys).softmax(-1)
        if self.dead_row is not None:
            p[:, self.dead_row] = 0
        return p


def _split_like(rows: Tensor, parts: list[Tensor]) -> tuple[Tensor, ...]:
    """Views (b, H, rows of a part, D) of rows (b, H, rows, D)."""
    return rows.split([part.shape[1] for part in parts], dim=2)


def _tiles(q: Streams, problem: Problem) -> list[Tile]:
    """A and M, then the targets in equal tiles, none larger than TARGET_TILE."""
    tokens, targets, cut, mask_tokens = problem.tokens, problem.targets, problem.cut, problem.mask_tokens
    with_content = q.content is not None
    window = tokens if mask_tokens else cut  # keys that a row of shift 0 sees
    tiles = []
    if with_content and window:
        masks = (slice(tokens, tokens + targets),) if mask_tokens else ()
        tiles += [Tile(rows, (), slice(0, window)) for rows in _row_tiles((slice(0, cut), *masks))]
    size = -(-targets // -(-targets // TARGET_TILE))
    for start in range(0, targets, size):
        stop = min(start + size, targets)
        key = start if mask_tokens else 0
        sizes = stop - start, start - key, window, mask_tokens, with_content
        mask = tile_mask(q.query.device, q.query.dtype, *sizes)
        content = (slice(cut + start, cut + stop),) if with_content else ()
        sees_nothing = not window and not start
        dead_row = (stop if with_content else 0) if sees_nothing else None
        tiles.append(Tile(content, (slice(start, stop),), slice(key, window + stop), mask, dead_row))
    return tiles


def _row_tiles(runs: tuple[slice, ...]) -> list[tuple[slice, ...]]:
    """Runs of rows in tiles of ROW_TILE rows at most, a tile taking from several runs."""
    tiles: list[tuple[slice, ...]] = []
    room = 0
    for run in runs:
        first = run.start
        while first < run.stop:
            if not room:
                tiles.append(())
                room = ROW_TILE
            last = min(first + room, run.stop)
            tiles[-1] += (slice(first, last),)
            room -= last - first
            first = last
    return tiles


def _chunks(like: Tensor, tiles: list[Tile]) -> Iterator[slice]:
    """As many images at a time as SCORE_BYTES allow, in parts as even as can be."""
    images, _, heads, _ = like.shape
    most = max(1, SCORE_BYTES // (max(tile.scores for tile in tiles) * heads * like.element_size()))
    size = -(-images // -(-images // most)) if images else 1
    for first in range(0, images, size):
        yield slice(first, min(first + size, images))


def _keys(x: Tensor, problem: Problem) -> Tensor:
    """Keys A, B, M as (b, keys, H, D) -> M, A, B as contiguous (b * H, keys, D)."""
    b, count, heads, size = x.shape
    keys, masks = x.new_empty(b, heads, count, size), count - problem.tokens
    keys[:, :, :masks] = x[:, problem.tokens :].transpose(1, 2)
    keys[:, :, masks:] = x[:, : problem.tokens].transpose(1, 2)
    return keys.flatten(0, 1)


def _put_keys(x: Tensor, out: Tensor, problem: Problem) -> None:
    """Write keys M, A, B as (b * H, keys, D) into `out` with keys A, B, M as (b, keys, H, D)."""
    x = x.unflatten(0, (-1, out.shape[2])).transpose(1, 2)
    masks = out.shape[1] - problem.tokens
    out[:, : problem.tokens] = x[:, masks:]
    out[:, problem.tokens :] = x[:, :masks]
