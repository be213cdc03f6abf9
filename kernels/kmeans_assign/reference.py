"""Nearest centroid in plain torch: chunked matrix products, and a float64 decision where fp32 cannot tell."""

import math

import torch
from torch import Tensor

from mapet_kernels.checks import check_finite_rows
from mapet_kernels.precision import full_fp32

CHUNK_BYTES = 64 * 2**20
"""Largest buffer of scores, differences or converted rows. Index lists of near ties may take up to four times that."""


PRODUCTS_PER_PAIR = 64
"""Entries of a float64 matrix product that take about as long as one row and one centroid compared directly."""


def kmeans_assign(x: Tensor, centroids: Tensor, exact: bool, return_distance: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest centroid of every row, for checked inputs.

    x is ([G,] n, D) and centroids ([G,] K, D), floating point. Returns ids ([G,] n) int64; squared distances ([G,] n),
    an empty tensor if not wanted, float64 if either input is, else fp32; and (2,) int64, how many rows were decided
    again in float64 among a few centroids, and how many among all. Raises ValueError for rows that are not finite.

    Scores. With x' = x - m and c' = c - m for any fixed m (here the mean centroid, so that a common offset costs no
    digits), the nearest centroid minimises S_k = |c'_k|^2 - 2 x'.c'_k; |x'|^2 is the same for every k and is left out.
    Before that, everything is multiplied by one power of two, which is exact, so that nothing overflows.

    Why the exact mode is exact. Let u be the unit round-off of the working dtype (2^-24 in fp32) and E = D + 8, or
    2 (D + 8) for float64 work. Within a term of S_k, subtracting m puts one factor (1 + d), |d| <= u, on the entry of
    x' and one on that of c', the product puts a third, and adding D + 1 numbers at most D + 1 more, in any order,
    blocked or fused. |c'_k|^2 is summed in float64 and then rounded (in float64 work that sum costs D + 8 factors of
    its own). So no term carries more than E factors, and by Cauchy-Schwarz over the terms the computed score s_k obeys
    (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1)

        |s_k - S_k| <= e := g (C^2 + 2 |x'| C) + 2^9 E t,    g = E u / (1 - E u),    C = max_k |c'_k|,

    where t is the smallest normal number: underflow, flushed to zero or not, adds less than 2^9 t per term because
    entries of x' and c' are below 16 after scaling. The nearest centroid k* thus has s_k* <= S_k* + e <= S_b + e
    <= s_b + 2e, where s_b is the best score. A third e covers the rounding of the threshold: |s_b| <= e/g + e, and
    u/g <= 1/9. So **every centroid scored above s_b + 3e is farther than the best one**, and a row with no second
    centroid below it is decided. The others are decided by sum((x - c)^2) in float64 from the original values, over
    the centroids below it only, ties to the lowest id. The norms in e are widened by 0.1 %, more than they lose to
    rounding, and by what squares lose to underflow.

    The cost: one matrix product, one top-2, and the near ties. Where fp32 leaves too many candidates (data far wider
    than the gaps between centroids), the same is done in float64 first, whose bound is 10^8 times tighter.
    """
    dtype = torch.float64 if torch.float64 in (x.dtype, centroids.dtype) else torch.float32
    check_finite_rows("centroids", centroids)
    check_finite_rows("x", x)
    ids = x.new_empty(x.shape[:-1], dtype=torch.int64)
    distances = x.new_empty(x.shape[:-1] if return_distance else (0,), dtype=dtype)
    again = torch.zeros(2, dtype=torch.int64, device="cpu")
    if ids.numel() == 0:
        return ids, distances, again.to(x.device)
    with full_fp32(x.device.type) if exact else torch.autocast(x.device.type, enabled=False):
        for group in range(x.shape[0] if x.dim() == 3 else 1):
            here = group if x.dim() == 3 else ...
            again += _nearest(x[here], centroids[here], dtype, exact, out=ids[here])
            if return_distance:
                squared_distances(x[here], centroids[here], ids[here], out=distances[here])
    return ids, distances, again.to(x.device)


def _nearest(x: Tensor, centroids: Tensor, dtype: torch.dtype, exact: bool, out: Tensor) -> Tensor:
    """Write into out (n,) the id of the nearest centroid (K, D) of every row of x (n, D).

    Returns how many rows were decided again: (2,) int64 on the CPU, among a few centroids and among all.
    """
    again = torch.zeros(2, dtype=torch.int64, device="cpu")
    scale = _power_of_two(x, centroids, dtype)
    centred = centroids.to(dtype) * scale
    mean = centred.mean(0)
    centred -= mean
    norms = torch.linalg.vector_norm(centred, dim=1, dtype=torch.float64)
    squares = norms.square().to(dtype)
    rows = _rows_of_a_chunk(max(centroids.shape), dtype)
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        shifted = part.to(dtype) * scale - mean
        # (n, D) @ (D, K) -> (n, K)
        scores = torch.addmm(squares, shifted, centred.T, alpha=-2)
        ids = scores.argmin(1)
        if exact and len(centroids) > 1:
            margin = 3 * _score_error(shifted, norms.max())
            again += _decide_near_ties(ids, scores, margin.to(dtype), part, centroids, scale)
        out[start : start + rows] = ids
    return again


def _power_of_two(x: Tensor, centroids: Tensor, dtype: torch.dtype) -> float:
    """A normal power of two that brings the largest magnitude below 8."""
    largest = max(abs(bound.item()) for values in (x, centroids) for bound in torch.aminmax(values))
    limit = -math.frexp(torch.finfo(dtype).tiny)[1]
    return math.ldexp(1.0, -min(max(math.frexp(largest)[1], -limit), limit))


def _score_error(shifted: Tensor, largest_norm: Tensor) -> Tensor:
    """e of `kmeans_assign` for every row, (n,) float64."""
    features, limits = shifted.shape[1], torch.finfo(shifted.dtype)
    factors = (features + 8) * (2 if shifted.dtype == torch.float64 else 1)
    roundings = factors * limits.eps / 2
    relative = roundings / (1 - roundings) if roundings < 0.5 else math.inf
    # A sum of so few squares is off by less than 0.05 % in fp32, and a pass in float64 takes several times as long.
    dtype = shifted.dtype if features <= 8192 else torch.float64
    lost_squares = math.sqrt(features * torch.finfo(dtype).tiny)
    row_norm = 1.001 * torch.linalg.vector_norm(shifted, dim=1, dtype=dtype).double() + lost_squares
    largest_norm = 1.001 * largest_norm + lost_squares
    return relative * largest_norm * (largest_norm + 2 * row_norm) + 2**9 * factors * limits.tiny


def _decide_near_ties(
    ids: Tensor, scores: Tensor, margin: Tensor, x: Tensor, centroids: Tensor, scale: float
) -> Tensor:
    """Overwrite the ids (n,) of rows with a second score within the margin of the best, by float64 distances.

    Returns what `_nearest` returns.
    """
    best_two = _two_smallest(scores, ids)
    threshold = best_two[:, 0] + margin
    tied = (best_two[:, 1] <= threshold).nonzero().squeeze(1)
    if len(tied) == 0:
        return torch.tensor([0, 0], device="cpu")
    rows, candidates = x[tied], scores[tied] <= threshold[tied, None]
    if scores.dtype == torch.float32 and candidates.sum() * PRODUCTS_PER_PAIR > candidates.numel():
        decided = torch.empty_like(tied)
        _nearest(rows, centroids, torch.float64, exact=True, out=decided)
        ids[tied] = decided
        return torch.tensor([0, len(tied)], device="cpu")
    i_row, i_centroid = candidates.nonzero().unbind(1)
    ids[tied] = nearest_of_pairs(rows, centroids, i_row, i_centroid, scale)
    return torch.tensor([len(tied), 0], device="cpu")


def _two_smallest(scores: Tensor, ids: Tensor) -> Tensor:
    """(n, 2), ascending, given the ids (n,) of the smallest; several times faster than torch.topk on the CPU."""
    smallest = scores.gather(1, ids[:, None])
    scores.scatter_(1, ids[:, None], math.inf)
    second = scores.amin(1, keepdim=True)
    scores.scatter_(1, ids[:, None], smallest)
    return torch.cat([smallest, second], dim=1)


def nearest_of_pairs(x: Tensor, centroids: Tensor, i_row: Tensor, i_centroid: Tensor, scale: float) -> Tensor:
    """The id (n,) of the nearest of each row's candidates by sum((scale x - scale c)^2) in float64, ties to the lowest.

    x is (n, D) and centroids (K, D); the pairs i_row and i_centroid (P,), in any order, hold at least one of each row.
    """
    distances = torch.empty(len(i_row), dtype=torch.float64, device=x.device)
    step = _rows_of_a_chunk(x.shape[1], torch.float64)
    for start in range(0, len(i_row), step):
        few = slice(start, start + step)
        difference = x[i_row[few]].double().mul_(scale) - centroids[i_centroid[few]].double().mul_(scale)
        distances[few] = difference.square_().sum(1)
    smallest = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    smallest.scatter_reduce_(0, i_row, distances, "amin")
    nearest = torch.where(distances <= smallest[i_row], i_centroid, len(centroids))
    return torch.full((len(x),), len(centroids), device=x.device).scatter_reduce_(0, i_row, nearest, "amin")


def squared_distances(x: Tensor, centroids: Tensor, ids: Tensor, out: Tensor) -> None:
    """Write |x - centroids[ids]|^2 into out (n,), from the differences: never negative, and 0 for equal rows."""
    rows = _rows_of_a_chunk(x.shape[1], out.dtype)
    for start in range(0, x.shape[0], rows):
        few = slice(start, start + rows)
        out[few] = (x[few].to(out.dtype) - centroids[ids[few]].to(out.dtype)).square_().sum(1)


def _rows_of_a_chunk(columns: int, dtype: torch.dtype) -> int:
    return max(1, CHUNK_BYTES // (columns * dtype.itemsize))
