"""Lloyd's k-means with the settings and repairs of the faiss library's Clustering (1.7), on one device.

Same algorithm, other random numbers: compare objectives, not centroids.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mapet_kernels.checks import check_finite_rows, check_floating
from mapet_kernels.kmeans_assign import kmeans_assign
from mapet_kernels.kmeans_update import kmeans_update

SPLIT = 1 / 1024
"""Relative push that separates the two copies of a split centroid."""
REDO_STRIDE = 15_486_557
"""Distance between the seeds of two redos."""
CHUNK_BYTES = 64 * 2**20
"""Largest buffer of differences to one centroid in k-means++."""


@dataclass(frozen=True)
class KMeansResult:
    """What `fit` found. Everything is of the kept redo, except `objectives`."""

    centroids: Tensor
    """(K, D) fp32, after the last update."""
    objective: float
    """Sum of squared distances in the last iteration, before its update; the redo with the smallest is kept."""
    objectives: tuple[tuple[float, ...], ...]
    """The same sum for every redo and iteration."""
    counts: Tensor
    """(K,) int64, rows of every cluster in the last iteration, before its update."""
    splits: int
    """Empty clusters that were refilled by splitting another, over all iterations."""
    redo: int
    rows: int
    """Rows used, after subsampling."""


def fit(
    x: Tensor,
    clusters: int,
    *,
    iterations: int = 20,
    redos: int = 5,
    init: str = "random",
    seed: int = 1234,
    max_points_per_centroid: int | None = 512,
    tolerance: float = 0.0,
    exact: bool = True,
    backend: str = "auto",
    on_iteration: Callable[[int, int, float], None] | None = None,
) -> KMeansResult:
    """Cluster the rows of x (n, D), any floating dtype, into K = clusters under squared L2.

    More than K * max_points_per_centroid rows are first reduced to a random subset of that size (None keeps all). Each
    redo starts from K distinct random rows (init "random") or from k-means++ ("k-means++"), and runs `iterations`
    times: assign, sum up the objective, move each centroid to the mean of its rows, split a cluster for every empty
    one. A redo ends early once an iteration lowers the objective by no more than `tolerance` times its value; 0 never
    does. `on_iteration(redo, iteration, objective)` is called after each assignment. A cluster to split is picked by
    cycling through them, accepting one of n_j rows with probability (n_j - 1) / (n - K). Random numbers come from
    `seed` alone, drawn on the CPU, so they are the same on every device.

    Raises ValueError for an x that is not (n, D), fewer rows than clusters, rows that are not finite (named), and
    arguments out of range; TypeError for a dtype that is not floating point.
    """
    check_floating("x", x)
    _check_arguments(x, clusters, iterations, redos, init, max_points_per_centroid, tolerance)
    check_finite_rows("x", x)
    x = _subsample(x.detach(), clusters, max_points_per_centroid, seed)
    best: KMeansResult | None = None
    objectives = []
    for redo in range(redos):
        generator = torch.Generator().manual_seed(seed + 1 + redo * REDO_STRIDE)
        centroids = INITS[init](x, clusters, generator)
        curve: list[float] = []
        splits = 0
        for iteration in range(iterations):
            ids, distances = kmeans_assign(x, centroids, exact=exact, return_distance=True, backend=backend)
            curve.append(distances.sum(dtype=torch.float64).item())
            if on_iteration is not None:
                on_iteration(redo, iteration, curve[-1])
            sums, counts = kmeans_update(x, ids, clusters, backend=backend)
            centroids = sums / counts.clamp(min=1)[:, None]
            splits += _split_empty(centroids, counts, generator)
            if tolerance > 0 and iteration > 0 and curve[-2] - curve[-1] <= tolerance * curve[-2]:
                break
        objectives.append(tuple(curve))
        if best is None or curve[-1] < best.objective:
            best = KMeansResult(centroids.float(), curve[-1], (), counts, splits, redo, len(x))
    return replace(best, objectives=tuple(objectives))


def _check_arguments(
    x: Tensor,
    clusters: int,
    iterations: int,
    redos: int,
    init: str,
    max_points_per_centroid: int | None,
    tolerance: float,
) -> None:
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be (rows, features) with at least one feature, got shape {tuple(x.shape)}")
    limits = {"clusters": clusters, "iterations": iterations, "redos": redos}
    if max_points_per_centroid is not None:
        limits["max_points_per_centroid"] = max_points_per_centroid
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if x.shape[0] < clusters:
        raise ValueError(f"{clusters} clusters need at least {clusters} rows, got {x.shape[0]}")
    if init not in INITS:
        raise ValueError(f"unknown init {init!r}; choose one of {', '.join(INITS)}")
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")


def _subsample(x: Tensor, clusters: int, max_points_per_centroid: int | None, seed: int) -> Tensor:
    if max_points_per_centroid is None or len(x) <= clusters * max_points_per_centroid:
        return x
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[: clusters * max_points_per_centroid].to(x.device)]


def _random_rows(x: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    return _working(x[torch.randperm(len(x), generator=generator)[:clusters].to(x.device)])


def _plus_plus(x: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each next row is drawn in proportion to its squared distance."""
    chosen = [_draw(torch.ones(len(x), dtype=torch.float64), generator)]
    nearest = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    while len(chosen) < clusters:
        _lower_to_distance(nearest, x, chosen[-1])
        # All zero: fewer distinct rows than clusters, so any row will do.
        weights = nearest if nearest.any() else torch.ones_like(nearest)
        chosen.append(_draw(weights, generator))
    return _working(x[torch.tensor(chosen, device=x.device)])


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    """An index of weights (n,) float64, in proportion to them."""
    steps = weights.cumsum(0)
    level = steps[-1] * torch.rand((), dtype=torch.float64, generator=generator).to(steps.device)
    return min(int(torch.searchsorted(steps, level, right=True)), len(weights) - 1)


def _lower_to_distance(nearest: Tensor, x: Tensor, row: int) -> None:
    """nearest (n,) = min(nearest, |x - x[row]|^2), in chunks."""
    rows = max(1, CHUNK_BYTES // (8 * x.shape[1]))
    for start in range(0, len(x), rows):
        few = slice(start, start + rows)
        distances = (_working(x[few]) - _working(x[row])).square_().sum(1, dtype=torch.float64)
        torch.minimum(nearest[few], distances, out=nearest[few])


INITS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "random": _random_rows,
    "k-means++": _plus_plus,
}


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _split_empty(centroids: Tensor, counts: Tensor, generator: torch.Generator) -> int:
    """Refill, in place, every empty cluster with half of another; returns how many were empty."""
    empty = (counts == 0).nonzero().flatten().tolist()
    sizes = counts.tolist()
    spare = max(sum(sizes) - len(sizes), 1)
    push = torch.full_like(centroids[0], 1 + SPLIT)
    push[1::2] = 1 - SPLIT
    for i_empty in empty:
        i_split = _pick_cluster(sizes, spare, generator)
        centroids[i_empty] = centroids[i_split] * push
        centroids[i_split] *= 2 - push
        sizes[i_empty] = sizes[i_split] // 2
        sizes[i_split] -= sizes[i_empty]
    return len(empty)


def _pick_cluster(sizes: list[int], spare: int, generator: torch.Generator) -> int:
    """The first cluster to accept, going round from cluster 0; a whole round is drawn at once."""
    chances = (torch.tensor(sizes) - 1) / spare
    while True:
        accepted = (torch.rand(len(sizes), generator=generator) < chances).nonzero()
        if len(accepted):
            return int(accepted[0])
