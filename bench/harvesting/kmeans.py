"""Nearest centroids: ours, exact and fast, beside a chunked matrix product with argmin."""

from __future__ import annotations

import torch

from bench import kmeans
from bench.harvesting.common import calls, device_of, timed
from bench.harvesting.part import Run
from bench.records import quantiles

SIZES = ((4096, 8192, 65536), (512, 8192, 65536))
"""(features, clusters, rows)."""


def measure(run: Run) -> None:
    """Each size: a few repeats of all ways at once, then more."""
    device, backend = device_of(run), "triton" if run.dry else "auto"
    for repeats in (1,) if run.dry else (3, 20):
        for features, clusters, rows in ((16, 24, 40),) if run.dry else SIZES:
            if run.left() <= 0:
                return
            made = kmeans.KMeansBenchmark((features,), (clusters,), rows, "fp16", device=device.type, backend=backend)
            x, centroids = kmeans.clip_like(made, features, clusters)
            ways, _ = kmeans.available_ways(x, centroids, made)
            exact = ways["exact"]()
            found = timed(run, {name: calls({"assign": way}) for name, way in ways.items()}, repeats, 2.0)
            for name, taken in found.items():
                figures = quantiles(taken["assign"])
                run.record(
                    "kmeans", way=name, shape={"features": features, "clusters": clusters, "rows": rows}, dtype="fp16",
                    flops_per_s=2 * features * clusters * rows / (figures["p50_ms"] / 1e3 or 1e-9),
                    equal_ids=(ways[name]() == exact).double().mean().item(), extra_bytes=extra_bytes(ways[name]),
                    **figures,
                )  # fmt: skip


def extra_bytes(way) -> int | None:
    """Peak beyond what was allocated before; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
