"""Nearest centroid on a GPU: one 16-bit tensor-core pass with a proven error bound, float64 for what it leaves open.

What is computed. For any vector m, argmin_k |x - c_k|^2 = argmin_k S_k with

    S_k = b_k - 2 x.(c_k - m),         b_k = |c_k - m|^2 + 2 m.(c_k - m)        for rows as they are, or
    S_k = b_k - 2 (x - m).(c_k - m),   b_k = |c_k - m|^2                        for centred rows;

|x|^2 is the same for every k and is left out. m is the mean centroid, so that what all centroids have in common costs
no digits. Float16 rows are used as they lie in memory, bfloat16 rows as float16 copies, which but for the range hold
all their digits, float32 rows as centred float16 copies: float16 keeps the 11 bits that TF32 keeps, at twice its
speed, as each copied row is first multiplied by a power of two W of its own. The centroids are copied once a call,
times one power of two P. With X = round(W x) (or round(W (x - m))), C_k = round(P (c_k - m)) and the tensor cores'
X.C_k, the score is P^2 b_k - 2 (P / W) X.C_k, about P^2 S_k.

The bound. Everything is scaled as said. Let d_k = C_k - P (c_k - m), known exactly, and R = X - W x, known too. Then

    |score_k - P^2 S_k| <= r a_k + z_k,
    r = 2 (P / W) max(|X|, |R| / q),   a_k = |d_k| + (q + g + 16 u) n_k,   n_k = |C_k| + |d_k| >= |P (c_k - m)|,
    z_k = 16 u |P^2 b_k| + 2^-36 B_k + 2^-100,

by Cauchy-Schwarz for the rounding of the operands (X.d_k and R.(c_k - m)); q = 2^-12 for copied rows, else 0 as R = 0;
u = 2^-24 for fewer than 16 fp32 roundings on the way from X.C_k to the number that is compared; B_k, the sum of the
magnitudes of the terms of P^2 b_k, for its float64 sum; 2^-100 for underflow. Norms are widened by 2^-9 for their own
rounding. g bounds the tensor cores' sum of D (padded) exact products, |X.C_k - computed| <= g |X| |C_k|.

What is assumed of tensor cores: one instruction adds t >= 4 exact products and the accumulator after cutting (not
rounding) each off at 2^-23 of the largest one's power of two, and cuts the sum off to 24 bits. That loses at most (t +
1) 2^-23 + 2^-23 <= 1.5 t 2^-23 of sum |X_i C_ki| <= |X| |C_k|, for each t products: g = G / (1 - G), G = 1.5 D 2^-23,
in whatever order and with whatever t. This is what was measured on sm_70, the coarsest: Fasi, Higham, Mikaitis and
Pranesh, "Numerical behavior of NVIDIA tensor cores" (PeerJ Computer Science 7:e330, 2021); for later ones see Khattak
and Mikaitis, "Accurate Models of NVIDIA Tensor Cores" (arXiv 2512.07004, 2025): an instruction takes more products and
more bits. Products and subnormal operands are exact in all of them.

Why the ids are exact. l_k = score_k - r a_k - z_k <= P^2 S_k <= h_k = l_k + 2 (r a_k + z_k). The kernel lowers
`reach`, the smallest h_k it has met, and holds every centroid with l_k <= reach. The nearest one k* is never missed,
as l_k* <= P^2 S_k* <= P^2 S_k <= h_k for every k. If at the end one held centroid has l_k <= reach, all others are
farther, and the row is decided. Else the few held ones are compared by sum((x - c)^2) in float64 from the original
values, ties to the lowest id. Rows for which the list was too short, or whose numbers left the range of fp32 (r then
is infinite), go to reference.py, which is exact by itself. A NaN or infinite feature makes r infinite too (in the fast
mode, the best score): such rows are found on the way, and are named in the error.

Passes over the rows: one to take their norms (and copy them), the scores, and the few that are decided again; the fast
mode reads 16-bit rows once.

Memory: a float16 copy of the centroids, the lists, and a copy of at most COPY_BYTES of rows. No (n, K) buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mapet_kernels import launch
from mapet_kernels.backends import INTERPRETED
from mapet_kernels.checks import check_finite_rows
from mapet_kernels.kmeans_assign import kernel, reference
from mapet_kernels.launch import AssignConfig
from mapet_kernels.triton_launch import Launch, architecture

COPY_BYTES = 512 * 2**20
"""Largest 16-bit copy of rows."""

CHUNK_ROWS = 2**18
"""Most rows of one pass, all groups together."""

MERGED_ROWS = 256
"""Rows of one program that merges the shares."""

ROW_ROUNDING = 2.0**-12
"""q of the bound: about the relative rounding error of a row."""


@dataclass(frozen=True)
class Centroids:
    """What the score kernel reads of the centroids; K padded to the tile and D to the product, G problems."""

    values: Tensor  # (G K, D) 16 bits
    bias: Tensor  # (G K) fp32: P^2 b_k - z_k, infinite for padding
    slope: Tensor  # (G K) fp32: a_k
    slack: Tensor  # (G K) fp32: z_k
    mean: Tensor  # (G, D not padded) fp32
    largest: Tensor  # (G,) fp32: the largest magnitude, which P is made of


@dataclass(frozen=True)
class Rows:
    """What the score kernel reads of the rows: (G n, D) 16 bits, and per row -2 P / W and r, where they are wanted."""

    values: Tensor
    scale: Tensor | None
    radius: Tensor | None


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
    shape = x.shape[:-1]
    ids = x.new_empty(shape, dtype=torch.int64)
    distances = x.new_empty(shape if return_distance else (0,), dtype=torch.float32)
    again = x.new_zeros(2, dtype=torch.int64)
    if ids.numel() == 0:
        check_finite_rows("centroids", centroids)
        return ids, distances, again
    groups = x if x.dim() == 3 else x[None]  # (G, n, D)
    group_centroids = centroids if x.dim() == 3 else centroids[None]  # (G, K, D)
    config = launch.kmeans_assign_scores(x.shape[-1], exact, architecture(x.device))
    direct = is_direct(groups, exact, config)
    part_launch, prepared = centroids_launch(group_centroids, x.dtype, direct, config)
    part_launch.run(x.device)
    step = _rows_of_a_pass(groups, direct, config)
    for start in range(0, groups.shape[1], step):
        part = groups[:, start : start + step]
        nearest, few, open_rows = _assign(part, group_centroids, prepared, direct, exact, config)
        if len(open_rows):
            _refuse_not_finite(x, centroids, part.reshape(-1, x.shape[-1])[open_rows])
            _decide_open(part, group_centroids, open_rows, exact, nearest)
        again += torch.tensor([few, len(open_rows)], device=x.device)
        ids.view(groups.shape[:2])[:, start : start + step] = nearest.view(part.shape[:2])
        if return_distance:
            part_launch, squared = distances_launch(part, group_centroids, nearest)
            part_launch.run(x.device)
            distances.view(groups.shape[:2])[:, start : start + step] = squared.view(part.shape[:2])
    return ids, distances, again


def _assign(
    x: Tensor, centroids: Tensor, prepared: Centroids, direct: bool, exact: bool, config: AssignConfig
) -> tuple[Tensor, int, Tensor]:
    """Ids (G n,) of x (G, n, D), how many of them float64 decided among a few, and the rows that are still open."""
    device = x.device
    rows_part, rows = rows_launch(x, prepared, direct, exact, config)
    if rows_part is not None:
        rows_part.run(device)
    scores_part, found = scores_launch(rows, prepared, x.shape[1], exact, config, _processors(device))
    scores_part.run(device)
    merge_part, nearest, status = merge_launch(found, config)
    merge_part.run(device)
    flagged = status.nonzero().squeeze(1)
    if len(flagged) and exact:
        decide_launch(x, centroids, flagged, status, found, nearest, config).run(device)
    open_rows = flagged[status[flagged] == kernel.OPEN.value]
    return nearest, len(flagged) - len(open_rows), open_rows


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


def centroids_launch(
    centroids: Tensor, row_dtype: torch.dtype, direct: bool, config: AssignConfig
) -> tuple[Launch, Centroids]:
    """16-bit copy and error coefficients of centroids (G, K, D), for rows that are read where they lie or copied."""
    groups, clusters, features = centroids.shape
    padded_clusters, padded_features = _padded(clusters, config.clusters), _padded(features, config.features)
    total, device = groups * padded_clusters, centroids.device
    mean = centroids.mean(1, dtype=torch.float32)
    largest = torch.linalg.vector_norm(centroids, ord=torch.inf, dim=(1, 2)).float()
    values = torch.empty(total, padded_features, dtype=row_dtype if direct else torch.float16, device=device)
    bias, slope, slack = torch.empty(3, total, dtype=torch.float32, device=device)
    block, together = _feature_blocks(padded_features, 1024)
    loss = 1.5 * padded_features * 2.0**-23
    return Launch(
        kernel.centroids_kernel,
        triton.cdiv(total, together),
        (
            *(centroids, mean, largest, values, bias, slope, slack, *centroids.stride()),
            *(clusters, features, padded_clusters, padded_features, total),
        ),
        {
            "CENTRED": _is_centred(row_dtype, direct),
            "ROW_ROUNDING": 0.0 if direct else ROW_ROUNDING,
            "PRODUCT_ROUNDING": loss / (1 - loss) if loss < 0.5 else float("inf"),
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
        return None, Rows(_flat(x), None, None)
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
            "CENTRED": _is_centred(x.dtype, direct),
            "ROW_ROUNDING": ROW_ROUNDING,
            "R": together,
            "BLOCK": block,
            "num_warps": 4,
        },
    ), Rows(_flat(x) if direct else copy, scale, radius)


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
    return Launch(
        kernel.decide_kernel,
        len(flagged),
        (
            *(x, centroids, flagged, status, found.best, found.ids, found.held, found.reach, nearest),
            *(*x.stride(), *centroids.stride(), x.shape[1], len(nearest), x.shape[2], len(found.best)),
        ),
        {"CAPACITY": config.capacity, "BLOCK": _feature_blocks(x.shape[2])[0], "num_warps": 4},
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


def is_direct(x: Tensor, exact: bool, config: AssignConfig) -> bool:
    """Whether the score kernel can read the rows x (G, n, D) where they lie.

    In the exact mode bfloat16 rows are copied: centroids rounded to their 8 bits would leave most rows open.
    """
    if x.dtype != torch.float16 and (exact or x.dtype != torch.bfloat16):
        return False
    one_matrix = x.stride(0) == x.shape[1] * x.stride(1) or x.shape[0] == 1
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) % 8 == 0 and x.stride(1) >= x.shape[2]
    return one_matrix and aligned and x.stride(2) == 1 and x.shape[2] % config.features == 0


def _is_centred(row_dtype: torch.dtype, direct: bool) -> bool:
    """Whether rows are centred: 16-bit ones are exact as they are, and would be rounded."""
    return not direct and row_dtype == torch.float32


def _rows_of_a_pass(x: Tensor, direct: bool, config: AssignConfig) -> int:
    """Rows of each group that one pass takes; all, if the groups would stop being one matrix."""
    groups, n, features = x.shape
    if direct and groups > 1:
        return n
    most = CHUNK_ROWS if direct else min(CHUNK_ROWS, COPY_BYTES // (2 * _padded(features, config.features)))
    return max(config.rows, most // groups // config.rows * config.rows)


def _empty_found(shares: int, rows: int, exact: bool, config: AssignConfig, device: torch.device) -> Found:
    shape = (shares, config.capacity, rows) if exact else (shares, rows)
    best = torch.empty(shape, dtype=torch.float32, device=device)
    ids = torch.empty(shape, dtype=torch.int32, device=device)
    if not exact:
        return Found(best, ids, None, None)
    held = torch.empty(shares, rows, dtype=torch.int32, device=device)
    return Found(best, ids, held, torch.empty(shares, rows, dtype=torch.float32, device=device))


def _flat(x: Tensor) -> Tensor:
    """x (G, n, D), whose groups follow each other, as (G n, D) without a copy."""
    return torch.as_strided(x, (x.shape[0] * x.shape[1], x.shape[2]), (x.stride(1), 1))


def _descriptor(matrix: Tensor, rows: int, config: AssignConfig):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, config.features])


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _padded(size: int, block: int) -> int:
    return triton.cdiv(size, block) * block


def _feature_blocks(features: int, elements: int = 2048) -> tuple[int, int]:
    """(features, rows) of a tile of `elements`, of the kernels that go through rows once."""
    block = min(1024, max(16, triton.next_power_of_2(features)))
    return block, elements // block
