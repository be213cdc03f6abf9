"""From the lists of csrc/kmeans_assign.cu to ids, in plain torch: which rows are decided, and the others in float64.

A row has L lists, ASSIGN_LISTS in each share of the centroids. In the exact mode a list holds the SLOTS lowest lower
bounds l_k among its centroids, ascending, and `reach`, an upper bound of the lowest exact score (bound.py). With reach
the smallest of a row's, the candidates are those with l_k <= reach. If the last slot of a list is one, the list may
have dropped others, and the row is open; otherwise up to 2 L candidates are compared in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mapet_kernels import launch
from mapet_kernels.kmeans_assign import bound, passes, reference
from mapet_kernels.kmeans_assign.bound import Centroids, Rows
from mapet_kernels.kmeans_assign.passes import DECIDED, OPEN, UNDECIDED, Steps
from mapet_kernels.launch import AssignConfig

CONFIG = AssignConfig(rows=128, clusters=128, features=32, warps=8, stages=2, descriptors=False, capacity=3)
"""Tiles of csrc/kmeans_assign.h; `capacity` is what one list holds in the exact mode."""

LISTS = 4
"""Lists of a row in each share of the centroids, as there."""

NO_ID = 2**31 - 1


@dataclass(frozen=True)
class Lists:
    """What the score kernel writes, for L lists and G n rows; a slot that nothing was put in has id -1."""

    bounds: Tensor  # (L, SLOTS, G n) fp32, ascending: lower bounds, or in the fast mode (SLOTS = 1) scores
    ids: Tensor  # (L, SLOTS, G n) int32, of centroids within the group
    reach: Tensor | None  # (L, G n) fp32


Scores = Callable[[Rows, Centroids, int, int, int, Lists], None]
"""Fills the lists: rows, centroids, groups G, rows n of each, shares S, lists; exact if there is a `reach`."""


def kmeans_assign(
    x: Tensor, centroids: Tensor, exact: bool, return_distance: bool, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """See `passes.run`; x ([G,] n, D) and centroids ([G,] K, D) are float16, bfloat16 or float32.

    Raises:
        TypeError: float64.
    """
    if torch.float64 in (x.dtype, centroids.dtype):
        raise TypeError("backend 'cuda' takes float16, bfloat16 and float32, got float64; use backend='reference'")
    steps = Steps(
        config=lambda *_: CONFIG,
        is_direct=is_direct,
        prepare=prepare,
        assign=partial(_assign, scores=scores),
        distances=_distances,
    )
    return passes.run(x, centroids, exact, return_distance, steps)


def is_direct(x: Tensor, exact: bool, config: AssignConfig) -> bool:
    """Whether rows (G, n, D) are read where they lie. Bfloat16 is always copied: V100 and T4 cannot multiply it."""
    return x.dtype == torch.float16 and passes.is_direct(x, exact, config)


def prepare(centroids: Tensor, row_dtype: torch.dtype, direct: bool, config: AssignConfig) -> Centroids:
    """Centroids (G, K, D) as the score kernel reads them."""
    return bound.centroids_of(centroids, row_dtype, direct, config.clusters, config.features)


def _assign(
    x: Tensor, centroids: Tensor, prepared: Centroids, direct: bool, exact: bool, config: AssignConfig, scores: Scores
) -> tuple[Tensor, int, Tensor]:
    """Ids (G n,) of x (G, n, D), how many of them float64 decided among a few, and the rows that are still open."""
    groups, n, _ = x.shape
    rows = bound.rows_of(x, prepared, direct)
    shares = launch.kmeans_assign_shares(
        groups * -(-n // config.rows), len(prepared.values) // groups, prepared.values.shape[1], config,
        passes.processors(x.device),
    )  # fmt: skip
    lists = empty_lists(shares, groups * n, exact, x.device)
    scores(rows, prepared, groups, n, shares, lists)
    nearest, status = merge(lists)
    undecided = (status == UNDECIDED).nonzero().squeeze(1)
    if len(undecided):
        _decide_few(x, centroids, lists, undecided, nearest)
    return nearest, len(undecided), (status == OPEN).nonzero().squeeze(1)


def empty_lists(shares: int, rows: int, exact: bool, device: torch.device) -> Lists:
    """Memory for the lists of so many rows."""
    shape = shares * LISTS, CONFIG.capacity if exact else 1, rows
    bounds = torch.empty(shape, dtype=torch.float32, device=device)
    ids = torch.empty(shape, dtype=torch.int32, device=device)
    return Lists(bounds, ids, torch.empty(shape[0], rows, dtype=torch.float32, device=device) if exact else None)


def merge(lists: Lists) -> tuple[Tensor, Tensor]:
    """Ids (G n,) int64, and per row DECIDED, UNDECIDED (several candidates) or OPEN (int8)."""
    if lists.reach is None:
        reach = lists.bounds.amin((0, 1))
        is_open = ~reach.isfinite()
    else:
        reach = lists.reach.amin(0)
        is_open = ~reach.isfinite() | (lists.bounds[:, -1] <= reach).any(0)
    candidates = lists.bounds <= reach
    nearest = torch.where(candidates, lists.ids, NO_ID).amin((0, 1)).long()
    if lists.reach is None:
        status = torch.where(is_open, OPEN, DECIDED)
    else:
        status = torch.where(is_open, OPEN, torch.where(candidates.sum((0, 1)) == 1, DECIDED, UNDECIDED))
    return nearest, status.to(torch.int8)


def _decide_few(x: Tensor, centroids: Tensor, lists: Lists, undecided: Tensor, nearest: Tensor) -> None:
    """Overwrite the ids (G n,) of these rows of x (G, n, D) by the nearest of their candidates in float64."""
    n = x.shape[1]
    bounds, ids = lists.bounds[..., undecided], lists.ids[..., undecided]
    candidates = bounds <= lists.reach[:, undecided].amin(0)
    i_row = candidates.nonzero()[:, 2]
    i_centroid = ids[candidates].long()
    for group in (undecided // n).unique().tolist():
        mine = (undecided // n == group).nonzero().squeeze(1)
        place = torch.full_like(undecided, -1)
        place[mine] = torch.arange(len(mine), device=place.device)
        pairs = place[i_row] >= 0
        nearest[undecided[mine]] = reference.nearest_of_pairs(
            x[group, undecided[mine] % n], centroids[group], place[i_row[pairs]], i_centroid[pairs], scale=1.0
        )


def _distances(x: Tensor, centroids: Tensor, nearest: Tensor) -> Tensor:
    """|x - centroids[nearest]|^2 (G n,) fp32 of x (G, n, D), from the differences."""
    ids = nearest.view(x.shape[:2])
    distances = torch.empty(ids.shape, dtype=torch.float32, device=x.device)
    for group in range(len(x)):
        reference.squared_distances(x[group], centroids[group], ids[group], out=distances[group])
    return distances.flatten()
