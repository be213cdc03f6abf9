"""Two-stream attention through torch's fused attention over the few distinct key ranges.

With the keys laid out M, A, B every row sees one window of N keys (visibility.py), so that a tile of targets [i0, i1)
needs keys [i0, N + i1) only, and its content and query rows share them:

    A and M rows              keys [0, N)             no mask
    B and G rows of a tile    keys [i0, N + i1)       one mask (2 * tile, N + tile), shared by every image and head

Without mask tokens (PIM) the windows start at 0: [0, c) for A, [0, c + i1) for a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mapet_kernels.dense_attention import attend, attend_backward
from mapet_kernels.two_stream_attention import by_cut
from mapet_kernels.two_stream_attention.problem import Problem, Streams
from mapet_kernels.two_stream_attention.tile_mask import tile_mask

TARGET_TILE = 96
"""Targets in a tile, at most: smaller tiles visit fewer masked keys, larger ones make fewer calls."""


def forward(q: Streams, k: Tensor, v: Tensor, out: Streams, lse: Streams, problem: Problem) -> None:
    """Fill `out` (B, rows, H, D) and `lse` (B, rows, H); content rows in permuted order."""
    if isinstance(problem.cut, Tensor):
        by_cut.forward(forward, q, k, v, out, lse, problem)
        return
    k, v = _mask_keys_first(k, problem.tokens), _mask_keys_first(v, problem.tokens)
    for tile in _tiles(q, problem):
        rows, row_lse = attend(_take(q, tile), k[:, :, tile.keys], v[:, :, tile.keys], tile.bias, problem.scale)
        if tile.dead_row is not None:
            rows[:, :, tile.dead_row] = 0
        _put(rows, out, tile)
        _put(row_lse, lse, tile)


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
    """Fill `dq` (content, query), `dk` and `dv`; `out` and `lse` are those of `forward`."""
    if isinstance(problem.cut, Tensor):
        by_cut.backward(backward, d_out, q, k, v, out, lse, dq, dk, dv, problem)
        return
    k, v = _mask_keys_first(k, problem.tokens), _mask_keys_first(v, problem.tokens)
    # Several tiles add to one key's gradient, so it is kept in fp32 until the end.
    work = torch.promote_types(k.dtype, torch.float32)
    dk_sum, dv_sum = torch.zeros_like(k, dtype=work), torch.zeros_like(v, dtype=work)
    for tile in _tiles(q, problem):
        d_rows = _take(d_out, tile)
        if tile.dead_row is not None:
            d_rows = d_rows.clone()
            d_rows[:, :, tile.dead_row] = 0
        dq_rows, dk_tile, dv_tile = attend_backward(
            d_rows,
            _take(q, tile),
            k[:, :, tile.keys],
            v[:, :, tile.keys],
            tile.bias,
            problem.scale,
            _take(out, tile),
            _take(lse, tile),
        )
        _put(dq_rows, dq, tile)
        dk_sum[:, :, tile.keys].add_(dk_tile)
        dv_sum[:, :, tile.keys].add_(dv_tile)
    _content_keys_first(dk_sum, dk, problem.tokens)
    _content_keys_first(dv_sum, dv, problem.tokens)


@dataclass(frozen=True)
class Tile:
    """Rows that share a key range. Row slices index the streams, keys the M, A, B layout; None is an empty stream."""

    content_rows: slice | None
    query_rows: slice | None
    keys: slice
    bias: Tensor | None
    dead_row: int | None = None  # the one row that can see nothing: G_0 without mask tokens and with cut 0


def _tiles(q: Streams, problem: Problem) -> Iterator[Tile]:
    tokens, cut, targets, mask_tokens = problem.tokens, problem.cut, problem.targets, problem.mask_tokens
    with_content = q.content is not None
    window = slice(0, tokens if mask_tokens else cut)
    if with_content and cut > 0:
        yield Tile(slice(0, cut), None, window, None)
    if with_content and mask_tokens:
        yield Tile(slice(tokens, tokens + targets), None, window, None)
    size = -(-targets // -(-targets // TARGET_TILE))  # equal tiles, none larger than TARGET_TILE
    for start in range(0, targets, size):
        stop = min(start + size, targets)
        keys = slice(start if mask_tokens else 0, (tokens if mask_tokens else cut) + stop)
        sizes = stop - start, start - keys.start, window.stop, mask_tokens, with_content
        bias = tile_mask(q.query.device, q.query.dtype, *sizes)
        sees_nothing = not mask_tokens and cut == 0 and start == 0
        dead_row = (stop - start if with_content else 0) if sees_nothing else None
        content_rows = slice(cut + start, cut + stop) if with_content else None
        yield Tile(content_rows, slice(start, stop), keys, bias, dead_row)


def _take(streams: Streams, tile: Tile) -> Tensor:
    """The tile's rows of both streams, heads first: (B, H, rows, ...)."""
    parts = []
    if tile.content_rows is not None:
        parts.append(streams.content[:, tile.content_rows])
    if tile.query_rows is not None:
        parts.append(streams.query[:, tile.query_rows])
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).transpose(1, 2)


def _put(rows: Tensor, streams: Streams, tile: Tile) -> None:
    """Write rows (B, H, rows, ...) back to where `_take` found them."""
    rows = rows.transpose(1, 2)
    split = 0
    if tile.content_rows is not None:
        split = tile.content_rows.stop - tile.content_rows.start
        streams.content[:, tile.content_rows] = rows[:, :split]
    if tile.query_rows is not None:
        streams.query[:, tile.query_rows] = rows[:, split:]


def _mask_keys_first(x: Tensor, tokens: int) -> Tensor:
    """Keys A, B, M as (B, keys, H, D) -> M, A, B as (B, H, keys, D)."""
    return torch.cat([x[:, tokens:], x[:, :tokens]], dim=1).transpose(1, 2)


def _content_keys_first(x: Tensor, out: Tensor, tokens: int) -> None:
    """Write keys M, A, B as (B, H, keys, D) into `out` with keys A, B, M as (B, keys, H, D)."""
    x = x.transpose(1, 2)
    out[:, :tokens] = x[:, x.shape[1] - tokens :]
    out[:, tokens:] = x[:, : x.shape[1] - tokens]
