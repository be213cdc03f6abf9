"""Nearest centroids as a contest: ours, exact and fast, beside chunked torch, flash-kmeans and faiss on one device.

`python -m bench kmeans` has more sizes and a whole fit; the ways are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import kmeans
from bench.contest import Arena, Contest, Entrant, timed_call
from bench.guard import Unavailable
from bench.options import Options
from bench.roofline import Cost

WAYS = ("exact", "fast", "torch_chunked", "flash_kmeans", "faiss_gpu")
SIZES = {"cpu": ((64, 256, 4096),), "cuda": ((512, 1024, 65536), (512, 8192, 65536), (4096, 8192, 65536))}
"""(features, clusters, rows) by device type."""
EXCESS = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 5e-1}
"""How much farther than the nearest centroid, relative to its distance, a way that rounds may choose; 0 for `exact`."""


def contests(chosen: Options, device: torch.device) -> list[Contest]:
    """One for each size and dtype."""
    return [contest(*size, dtype, device) for dtype in chosen.dtype for size in SIZES[device.type]]


def contest(features: int, clusters: int, rows: int, dtype: str, device: torch.device) -> Contest:
    """Ids of `rows` rows."""
    sizes = {"features": features, "clusters": clusters, "rows": rows}
    made = kmeans.KMeansBenchmark((features,), (clusters,), rows, dtype, device=device.type)
    return Contest(
        "kmeans", f"D {features} K {clusters} n {rows} {dtype}", sizes, ("assign",), WAYS, "exact", dtype,
        partial(arena, made),
    )  # fmt: skip


@contextmanager
def arena(made: kmeans.KMeansBenchmark) -> Iterator[Arena]:
    """Rows and centroids, and the distances of some rows to all centroids in float64."""
    features, clusters = made.features[0], made.clusters[0]
    x, centroids = kmeans.clip_like(made, features, clusters)
    ways, skipped = kmeans.available_ways(x, centroids, made)
    rows = torch.arange(0, len(x), max(1, len(x) // kmeans.CHECKED_ROWS), device=x.device)
    distances = torch.stack([(centroids.double() - x[row].double()).square_().sum(1) for row in rows])
    exact = ways["exact"]()
    flop = 2 * made.rows * features * clusters
    moved = x.numel() * x.element_size() + centroids.numel() * 4 + 8 * made.rows
    yield Arena(
        {name: partial(entrant, name, ways, skipped, exact) for name in WAYS},
        partial(judge, rows, distances, made.dtype),
        {"assign": Cost(flop, moved)},
    )


def entrant(name: str, ways: dict[str, Callable[[], Tensor]], skipped: dict[str, str], exact: Tensor) -> Entrant:
    """A way to the ids; Unavailable with the reason it was skipped for."""
    if name not in ways:
        raise Unavailable(skipped[name])
    way = ways[name]

    def facts() -> dict[str, Any]:
        return {"equal_ids": (way() == exact).double().mean().item()}

    return Entrant(timed_call("assign", way), lambda: (name, way()), way, facts=facts)


def judge(rows: Tensor, distances: Tensor, dtype: str, results: tuple[str, Tensor]) -> dict[str, float]:
    """Excess of the chosen centroids' distances over the smallest ones, in units of what is allowed."""
    name, ids = results
    chosen = distances.gather(1, ids[rows].unsqueeze(1)).squeeze(1)
    smallest = distances.min(1).values
    rounding = 4 * distances.shape[1] * 2.0**-53
    allowed = rounding if name == "exact" else max(rounding, EXCESS[dtype])
    return {"distance": ((chosen / smallest.clamp(min=1e-300) - 1).max() / allowed).item()}
