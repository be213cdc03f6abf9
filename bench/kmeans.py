"""Nearest centroids, exact and fast, beside the ways a user would take instead on the same device.

Peers are faiss-gpu, flash-kmeans and a chunked torch matmul with argmin. The exact ids are checked against float64
distances on a sample of rows; the others may choose centroids that are a little farther away, as their rounding has it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.contest import Arena, Contest, Entrant, Timed
from bench.guard import Unavailable
from bench.options import DTYPES, Options
from bench.roofline import Cost
from mapet_kernels import kmeans_assign

WAYS = ("exact", "fast", "torch_chunked", "flash_kmeans", "faiss_gpu")
SIZES = {
    "cpu": ((64, 256, 4096),),
    "cuda": tuple((features, clusters, 65536) for features in (64, 512, 4096) for clusters in (1024, 8192, 65536)),
}
"""(features, clusters, rows) by device type."""
EXCESS = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 5e-1}
"""How much farther than the nearest centroid, relative to its distance, a way that rounds may choose."""
CHECKED_ROWS = 64
CHUNK_BYTES = 256 * 2**20
"""Scores that the torch peer holds at a time."""


def contests(chosen: Options, device: torch.device) -> list[Contest]:
    """One for each size and dtype."""
    return [
        Contest(
            "kmeans", f"D {features} K {clusters} n {rows} {dtype}",
            {"features": features, "clusters": clusters, "rows": rows, "backend": chosen.backend}, ("assign",), WAYS,
            "exact", dtype, partial(arena, features, clusters, rows, dtype, device, chosen.backend),
        )
        for dtype in chosen.dtype
        for features, clusters, rows in SIZES[device.type]
    ]  # fmt: skip


@contextmanager
def arena(
    features: int, clusters: int, rows: int, dtype: str, device: torch.device, backend: str = "auto"
) -> Iterator[Arena]:
    """Rows and centroids, and the distances of some rows to all centroids in float64."""
    x, centroids = clip_like(rows, features, clusters, DTYPES[dtype], device)
    ways, skipped = available_ways(x, centroids, backend)
    checked = torch.arange(0, rows, max(1, rows // CHECKED_ROWS), device=device)
    distances = torch.stack([(centroids.double() - x[row].double()).square_().sum(1) for row in checked])
    exact, redecided = kmeans_assign(x, centroids, return_redecided=True, backend=backend)

    def entrant(name: str) -> Entrant:
        if name in skipped:
            raise Unavailable(skipped[name])
        way = ways[name]

        def facts() -> dict[str, Any]:
            found = {"equal_ids": (way() == exact).double().mean().item()}
            shares = dict(zip(("among_few", "among_all"), (redecided / rows).tolist(), strict=True))
            return found | ({"redecided_share": shares} if name == "exact" else {})

        return Entrant({"assign": Timed(way)}, lambda: (name, way()), way, facts=facts)

    moved = x.numel() * x.element_size() + centroids.numel() * 4 + 8 * rows
    costs = {"assign": Cost(2 * rows * features * clusters, moved)}
    yield Arena({name: partial(entrant, name) for name in WAYS}, partial(judge, checked, distances, dtype), costs)


def judge(rows: Tensor, distances: Tensor, dtype: str, results: tuple[str, Tensor]) -> dict[str, float]:
    """Excess of the chosen centroids' distances over the smallest ones, in units of what is allowed."""
    name, ids = results
    chosen = distances.gather(1, ids[rows].unsqueeze(1)).squeeze(1)
    smallest = distances.min(1).values
    rounding = 4 * distances.shape[1] * 2.0**-53
    allowed = rounding if name == "exact" else max(rounding, EXCESS[dtype])
    return {"distance": ((chosen / smallest.clamp(min=1e-300) - 1).max() / allowed).item()}


def clip_like(
    rows: int, features: int, clusters: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Non-negative rows (n, D) of independent features, which leave many near ties, and fp32 centroids (K, D)."""
    generator = torch.Generator(device).manual_seed(0)
    x, centroids = (
        torch.randn(count, features, device=device, generator=generator).relu_() for count in (rows, clusters)
    )
    return x.to(dtype), centroids


def available_ways(
    x: Tensor, centroids: Tensor, backend: str = "auto"
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Ways to the ids by name, with inputs prepared as each wants them, and the peers left out with the reason."""
    same = centroids.to(x.dtype)
    ways: dict[str, Callable[[], Tensor]] = {
        "exact": lambda: kmeans_assign(x, centroids, backend=backend),
        "fast": lambda: kmeans_assign(x, centroids, exact=False, backend=backend),
        "torch_chunked": lambda: chunked_argmin(x, same),
    }
    skipped = {}
    if (reason := reason_against("flash_kmeans", x)) is not None:
        skipped["flash_kmeans"] = reason
    else:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        squares = x.float().square().sum(1)[None]
        ways["flash_kmeans"] = lambda: euclid_assign_triton(x[None], same[None], squares)[0].long()
    if (reason := reason_against("faiss", x)) is not None:
        skipped["faiss_gpu"] = reason
    else:
        import faiss
        import faiss.contrib.torch_utils

        resources = faiss.StandardGpuResources()
        ways["faiss_gpu"] = lambda: faiss.knn_gpu(resources, x, same, 1)[1][:, 0]
    return ways, skipped


def reason_against(package: str, x: Tensor) -> str | None:
    """Why a peer cannot take part, or None."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    if not x.is_cuda:
        return "needs a CUDA device"
    if package == "faiss" and not hasattr(importlib.import_module("faiss"), "StandardGpuResources"):
        return "this faiss is built without GPU support"
    return "takes float16 and float32" if package == "faiss" and x.dtype == torch.bfloat16 else None


def chunked_argmin(x: Tensor, centroids: Tensor) -> Tensor:
    """argmin of |c|^2 - 2 x.c in the inputs' dtype, a chunk of rows at a time."""
    squares = centroids.float().square().sum(1).to(x.dtype)
    rows = max(1, CHUNK_BYTES // (x.element_size() * len(centroids)))
    return torch.cat([torch.addmm(squares, part, centroids.T, alpha=-2).argmin(1) for part in x.split(rows)])
