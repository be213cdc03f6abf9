"""One call in passes over chunks of rows: what the backends with an error bound (bound.py) have in common.

Passes over the rows: one to take their norms (and copy them), the scores, and the few that are decided again.

Memory: a float16 copy of the centroids, the lists, and a copy of at most COPY_BYTES of rows. No (n, K) buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mapet_kernels.checks import check_finite_rows
from mapet_kernels.kmeans_assign import reference
from mapet_kernels.kmeans_assign.bound import Centroids, padded
from mapet_kernels.launch import AssignConfig

COPY_BYTES = 512 * 2**20
"""Largest 16-bit copy of rows."""

CHUNK_ROWS = 2**18
"""Most rows of one pass, all groups together: few enough to be counted in 32 bits."""

DECIDED, UNDECIDED, OPEN = 0, 1, 2
"""Of a row after a pass: its id is final; it has a few candidates; or more than a list holds, or it is out of range."""


@dataclass(frozen=True)
class Steps:
    """What a backend brings; x is (G, n, D), centroids (G, K, D).

    config: features, exact, device -> tiles.
    is_direct: x, exact, config -> whether the score kernel can read the rows where they lie.
    prepare: centroids, dtype of the rows, direct, config -> the centroids as the score kernel reads them.
    assign: x, centroids, prepared, direct, exact, config -> ids (G n,), how many of them float64 decided among a few
        candidates, and the rows that are still open.
    distances: x, centroids, ids (G n,) -> squared distances (G n,) fp32.
    """

    config: Callable[[int, bool, torch.device], AssignConfig]
    is_direct: Callable[[Tensor, bool, AssignConfig], bool]
    prepare: Callable[[Tensor, torch.dtype, bool, AssignConfig], Centroids]
    assign: Callable[[Tensor, Tensor, Centroids, bool, bool, AssignConfig], tuple[Tensor, int, Tensor]]
    distances: Callable[[Tensor, Tensor, Tensor], Tensor]


def run(
    x: Tensor, centroids: Tensor, exact: bool, return_distance: bool, steps: Steps
) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest centroid of every row: see `reference.kmeans_assign` for arguments and results, fp32 distances.

    Raises ValueError for rows that are not finite (named).
    """
    shape = x.shape[:-1]
    ids = x.new_empty(shape, dtype=torch.int64)
    distances = x.new_empty(shape if return_distance else (0,), dtype=torch.float32)
    again = x.new_zeros(2, dtype=torch.int64)
    if ids.numel() == 0:
        check_finite_rows("centroids", centroids)
        return ids, distances, again
    groups = x if x.dim() == 3 else x[None]  # (G, n, D)
    group_centroids = centroids if x.dim() == 3 else centroids[None]  # (G, K, D)
    config = steps.config(x.shape[-1], exact, x.device)
    direct = steps.is_direct(groups, exact, config)
    prepared = steps.prepare(group_centroids, x.dtype, direct, config)
    for few_groups, few_rows in pieces(groups.shape[0], groups.shape[1], rows_of_a_pass(groups, direct, config)):
        part, part_centroids = groups[few_groups, few_rows], group_centroids[few_groups]
        part_prepared = prepared.of_groups(few_groups)
        nearest, few, open_rows = steps.assign(part, part_centroids, part_prepared, direct, exact, config)
        if len(open_rows):
            _refuse_not_finite(x, centroids, part.reshape(-1, x.shape[-1])[open_rows])
            _decide_open(part, part_centroids, open_rows, exact, nearest)
        again += torch.tensor([few, len(open_rows)], device=x.device)
        ids.view(groups.shape[:2])[few_groups, few_rows] = nearest.view(part.shape[:2])
        if return_distance:
            squared = steps.distances(part, part_centroids, nearest)
            distances.view(groups.shape[:2])[few_groups, few_rows] = squared.view(part.shape[:2])
    return ids, distances, again


def _refuse_not_finite(x: Tensor, centroids: Tensor, open_rows: Tensor) -> None:
    """Raise ValueError if the centroids or the rows that stayed open (R, D) are not finite; x is read to name them."""
    check_finite_rows("centroids", centroids)
    if not torch.linalg.vector_norm(open_rows, ord=torch.inf).isfinite():
        check_finite_rows("x", x)


def _decide_open(x: Tensor, centroids: Tensor, open_rows: Tensor, exact: bool, nearest: Tensor) -> None:
    """Overwrite the ids (G n,) of these rows of x (G, n, D), by the reference."""
    n = x.shape[1]
    for group in range(x.shape[0]):
        mine = open_rows[open_rows // n == group]
        if len(mine):
            nearest[mine] = reference.kmeans_assign(x[group, mine % n], centroids[group], exact, False)[0]


def is_direct(x: Tensor, exact: bool, config: AssignConfig) -> bool:
    """Whether a score kernel can read the rows x (G, n, D) where they lie.

    In the exact mode bfloat16 rows are copied: centroids rounded to their 8 bits would leave most rows open.
    """
    if x.dtype != torch.float16 and (exact or x.dtype != torch.bfloat16):
        return False
    together = x.stride(0) == x.shape[1] * x.stride(1) or x.shape[0] == 1
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) % 8 == 0 and x.stride(1) >= x.shape[2]
    return together and aligned and x.stride(2) == 1 and x.shape[2] % config.features == 0


def rows_of_a_pass(x: Tensor, direct: bool, config: AssignConfig) -> int:
    """Most rows, of all its groups together, that one pass takes of x (G, n, D): whole tiles."""
    most = CHUNK_ROWS if direct else min(CHUNK_ROWS, COPY_BYTES // (2 * padded(x.shape[2], config.features)))
    return max(config.rows, most // config.rows * config.rows)


def pieces(groups: int, n: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Groups and rows of each pass, at most so many rows: several whole groups, or a part of one.

    Either is one matrix of rows where all groups together are one.
    """
    together = max(1, most // n)
    for group in range(0, groups, together):
        for start in range(0, n, most):
            yield slice(group, min(group + together, groups)), slice(start, min(start + most, n))


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
