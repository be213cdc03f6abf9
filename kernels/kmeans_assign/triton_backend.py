"""Nearest centroid on a GPU by Triton: one 16-bit tensor-core pass with a proven error bound, float64 for the rest.

The formulas, the error bound and its proof are in bound.py, the loop over chunks of rows in passes.py. The fast mode
reads 16-bit rows once.

Here a row has one list in each share of the centroids. `reach` is lowered by every centroid that might be the nearest
when it is met, and such a centroid is held as long as its lower bound is within reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mapet_kernels import launch
from mapet_kernels.backends import INTERPRETED
from mapet_kernels.kmeans_assign import bound, kernel, passes
from mapet_kernels.kmeans_assign.bound import ROW_ROUNDING, Centroids, Rows, is_centred, one_matrix, padded
from mapet_kernels.kmeans_assign.passes import OPEN, Steps, is_direct
from mapet_kernels.launch import AssignConfig
from mapet_kernels.triton_launch import Launch, target

MERGED_ROWS = 256
"""Rows of one program that merges the shares."""


DECIDING_FEATURES = 512
"""Features that are compared at a time, of a row that has a few candidates; twice as many spilled on sm_80."""


@dataclass(frozen=True)
class Found:
    """What the score kernel writes: S shares of the centroids, G n rows; see `kernel.scores_kernel`."""

    best: Tensor
    ids: Tensor
    held: Tensor | None
    reach: Tensor | None


def kmeans_assign(x: Tensor, centroids: Tensor, exact: bool, return_distance: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest centroid of every row: see `reference.kmeans_assign` for the results.

    x is ([G,] n, D) and centroids ([G,] K, D), float16, bfloat16 or float32. Not `exact`: one pass with the operands
    rounded as described above, bfloat16 as it is.

    Raises:
        ValueError: rows that are not finite (named); bfloat16 in the interpreter, which computes it wrongly.
        TypeError: float64.
    """
    if torch.float64 in (x.dtype, centroids.dtype):
        raise TypeError("backend 'triton' takes float16, bfloat16 and float32, got float64; use backend='reference'")
    if INTERPRETED and torch.bfloat16 in (x.dtype, centroids.dtype):
        raise ValueError("backend 'triton' under TRITON_INTERPRET=1 is wrong in bfloat16: use float16 or float32")
    return passes.run(x, centroids, exact, return_distance, STEPS)


def _config(features: int, exact: bool, device: torch.device) -> AssignConfig:
    return launch.kmeans_assign_scores(features, exact, target(device))


def _prepare(centroids: Tensor, row_dtype: torch.dtype, direct: bool, config: AssignConfig) -> Centroids:
    part, prepared = centroids_launch(centroids, row_dtype, direct, config)
    part.run(centroids.device)
    return prepared


def _assign(
    x: Tensor, centroids: Tensor, prepared: Centroids, direct: bool, exact: bool, config: AssignConfig
) -> tuple[Tensor, int, Tensor]:
    """Ids (G n,) of x (G, n, D), how many of them float64 decided among a few, and the rows that are still open."""
    device = x.device
    rows_part, rows = rows_launch(x, prepared, direct, exact, config)
    if rows_part is not None:
        rows_part.run(device)
    scores_part, found = scores_launch(rows, prepared, x.shape[1], exact, config, passes.processors(device))
    scores_part.run(device)
    merge_part, nearest, status = merge_launch(found, config)
    merge_part.run(device)
    flagged = status.nonzero().squeeze(1)
    if len(flagged) and exact:
        decide_launch(x, centroids, flagged, status, found, nearest, config).run(device)
    open_rows = flagged[status[flagged] == OPEN]
    return nearest, len(flagged) - len(open_rows), open_rows


def _distances(x: Tensor, centroids: Tensor, nearest: Tensor) -> Tensor:
    part, distances = distances_launch(x, centroids, nearest)
    part.run(x.device)
    return distances


STEPS = Steps(_config, is_direct, _prepare, _assign, _distances)


def centroids_launch(
    centroids: Tensor, row_dtype: torch.dtype, direct: bool, config: AssignConfig
) -> tuple[Launch, Centroids]:
    """16-bit copy and error coefficients of centroids (G, K, D), for rows that are read where they lie or copied."""
    groups, clusters, features = centroids.shape
    padded_clusters, padded_features = padded(clusters, config.clusters), padded(features, config.features)
    total, device = groups * padded_clusters, centroids.device
    mean, largest = bound.mean_and_largest(centroids)
    values = torch.empty(total, padded_features, dtype=row_dtype if direct else torch.float16, device=device)
    bias, slope, slack = torch.empty(3, total, dtype=torch.float32, device=device)
    block, together = _feature_blocks(padded_features, 1024)
    return Launch(
        kernel.centroids_kernel,
        triton.cdiv(total, together),
        (
            *(centroids, mean, largest, values, bias, slope, slack, *centroids.stride()),
            *(clusters, features, padded_clusters, padded_features, total),
        ),
        {
            "CENTRED": is_centred(row_dtype, direct),
            "ROW_ROUNDING": 0.0 if direct else ROW_ROUNDING,
            "PRODUCT_ROUNDING": bound.product_rounding(padded_features),
            "R": together,
            "BLOCK": block,
            "num_warps": 4,
        },
    ), Centroids(values, bias, slope, slack, mean, largest)


def rows_launch(
    x: Tensor, prepared: Centroids, direct: bool, exact: bool, config: AssignConfig
) -> tuple[Launch | None, Rows]:
    """x (G, n, D) as the score kernel reads it, and what the bound needs of each row; no launch if that is nothing."""
    groups, n, features = x.shape
    if direct and not exact:
        return None, Rows(one_matrix(x), None, None)
    total, padded_features = groups * n, prepared.values.shape[1]
    scale, radius = torch.empty(2, total, dtype=torch.float32, device=x.device)
    copy = None if direct else torch.empty(total, padded_features, dtype=torch.float16, device=x.device)
    block, together = _feature_blocks(padded_features)
    return Launch(
        kernel.rows_kernel,
        triton.cdiv(total, together),
        (
            *(x, prepared.mean, prepared.largest, copy, scale, radius, *x.stride()),
            *(n, total, features, padded_features),
        ),
        {
            "COPY": not direct,
            "CENTRED": is_centred(x.dtype, direct),
            "ROW_ROUNDING": ROW_ROUNDING,
            "R": together,
            "BLOCK": block,
            "num_warps": 4,
        },
    ), Rows(one_matrix(x) if direct else copy, scale, radius)


def scores_launch(
    rows: Rows, prepared: Centroids, n: int, exact: bool, config: AssignConfig, processors: int
) -> tuple[Launch, Found]:
    """The pass over all centroids, for n rows of each group, and where it leaves its results."""
    total, padded_features = len(rows.values), prepared.values.shape[1]
    groups = total // n
    padded_clusters = len(prepared.values) // groups
    row_tiles = triton.cdiv(n, config.rows)
    shares = launch.kmeans_assign_shares(groups * row_tiles, padded_clusters, padded_features, config, processors)
    found = _empty_found(shares, total, exact, config, rows.values.device)
    x, c = rows.values, prepared.values
    if config.descriptors:
        x, c = _descriptor(x, config.rows, config), _descriptor(c, config.clusters, config)
    arguments = (
        *(x, c, prepared.bias, prepared.slope, prepared.slack, rows.scale, rows.radius, prepared.largest),
        *(found.best, found.ids, found.held, found.reach),
        *(n, total, rows.values.stride(0), padded_clusters, len(prepared.values), padded_features),
        *(row_tiles, shares, triton.cdiv(padded_clusters // config.clusters, shares)),
    )
    constants = {
        "EXACT": exact,
        "CAPACITY": config.capacity,
        "BM": config.rows,
        "BN": config.clusters,
        "BK": config.features,
        "ONE_PRODUCT": padded_features == config.features,
        "DESCRIPTORS": config.descriptors,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    return Launch(kernel.scores_kernel, groups * row_tiles * shares, arguments, constants), found


def merge_launch(found: Found, config: AssignConfig) -> tuple[Launch, Tensor, Tensor]:
    """The launch, ids (G n,) int64, and (G n,) int8: 0 where the id is final, else what is left to do."""
    rows, device = found.best.shape[-1], found.best.device
    nearest = torch.empty(rows, dtype=torch.int64, device=device)
    status = torch.empty(rows, dtype=torch.int8, device=device)
    return (
        Launch(
            kernel.merge_kernel,
            triton.cdiv(rows, MERGED_ROWS),
            (found.best, found.ids, found.held, found.reach, nearest, status, rows, len(found.best)),
            {"EXACT": found.held is not None, "CAPACITY": config.capacity, "BLOCK": MERGED_ROWS, "num_warps": 4},
        ),
        nearest,
        status,
    )


def decide_launch(
    x: Tensor, centroids: Tensor, flagged: Tensor, status: Tensor, found: Found, nearest: Tensor, config: AssignConfig
) -> Launch:
    """Overwrites the ids of flagged rows that have a few candidates, by float64 distances."""
    block = min(DECIDING_FEATURES, _feature_blocks(x.shape[2])[0])
    return Launch(
        kernel.decide_kernel,
        len(flagged),
        (
            *(x, centroids, flagged, status, found.best, found.ids, found.held, found.reach, nearest),
            *(*x.stride(), *centroids.stride(), x.shape[1], len(nearest), x.shape[2], len(found.best)),
        ),
        {"CAPACITY": config.capacity, "BLOCK": block, "num_warps": 4},
    )


def distances_launch(x: Tensor, centroids: Tensor, nearest: Tensor) -> tuple[Launch, Tensor]:
    """|x - centroids[nearest]|^2 (G n,) fp32 of x (G, n, D), from the differences."""
    distances = torch.empty(len(nearest), dtype=torch.float32, device=x.device)
    block, together = _feature_blocks(x.shape[2])
    return Launch(
        kernel.distances_kernel,
        triton.cdiv(len(nearest), together),
        (
            *(x, centroids, nearest, distances, *x.stride(), *centroids.stride()),
            *(x.shape[1], len(nearest), x.shape[2]),
        ),
        {"R": together, "BLOCK": block, "num_warps": 4},
    ), distances


def _empty_found(shares: int, rows: int, exact: bool, config: AssignConfig, device: torch.device) -> Found:
    shape = (shares, config.capacity, rows) if exact else (shares, rows)
    best = torch.empty(shape, dtype=torch.float32, device=device)
    ids = torch.empty(shape, dtype=torch.int32, device=device)
    if not exact:
        return Found(best, ids, None, None)
    held = torch.empty(shares, rows, dtype=torch.int32, device=device)
    return Found(best, ids, held, torch.empty(shares, rows, dtype=torch.float32, device=device))


def _descriptor(matrix: Tensor, rows: int, config: AssignConfig):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, config.features])


def _feature_blocks(features: int, elements: int = 2048) -> tuple[int, int]:
    """(features, rows) of a tile of `elements`, of the kernels that go through rows once."""
    block = min(1024, max(16, triton.next_power_of_2(features)))
    return block, elements // block
