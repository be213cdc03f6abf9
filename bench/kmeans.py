"""python -m bench kmeans: assign rows to centroids, exact and fast, beside the ways a user would take instead.

Peers are faiss-gpu, flash-kmeans and a chunked torch matmul with argmin; one that is not installed is skipped by name.
The exact ids are checked against float64 distances on a sample of rows before anything is timed; for the others the
share of rows that have the exact id is told.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import records, timing
from mapet_kernels import kmeans_assign
from mapet_kernels.kmeans import fit

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CHECKED_ROWS = 64
CHUNK_BYTES = 256 * 2**20
"""Scores that the torch peer holds at a time."""


@dataclass(frozen=True)
class KMeansBenchmark:
    """Nearest centroids and a whole fit, beside peers: every combination of features and clusters.

    Attributes:
        rows: how many rows a call assigns.
        backend: of ours, as in kmeans_assign.
        fit_rows: rows of the fit from end to end, one start, at the largest features and median clusters; 0: none.
        device: "cuda", or "cpu" for small sizes.
        output: folder for the record.
    """

    features: tuple[int, ...] = (64, 512, 4096)
    clusters: tuple[int, ...] = (1024, 8192, 65536)
    rows: int = 65536
    dtype: str = "fp16"
    backend: str = "auto"
    repeats: int = 10
    fit_rows: int = 262144
    fit_iterations: int = 20
    device: str = "cuda"
    record: bool = True
    output: Path = records.RESULTS

    def run(self) -> None:
        """Measure, print a line a way, and keep a record if wanted."""
        results = run(self)
        if self.record:
            from bench import kmeans_plot  # matplotlib, which a machine that only measures may lack

            path = records.write("kmeans", f"{self.dtype}_{self.device}", results, self.output)
            print(f"record: {path}\npicture: {kmeans_plot.draw(path)}")


def run(options: KMeansBenchmark) -> dict[str, Any]:
    """The record's results: for each size and way p20/p50/p80, TFLOP/s of the products, memory and equal ids.

    Raises:
        ValueError: the device is not there.
        RuntimeError: an exact id is not the float64 argmin; nothing of that size is timed then.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device; --device cpu measures the reference backend, on small sizes")
    before = records.device_state(torch.device(options.device))
    sizes = [measure(options, features, clusters) for features in options.features for clusters in options.clusters]
    return {
        "rows": options.rows, "dtype": options.dtype, "backend": options.backend, "device_type": options.device,
        "sizes": sizes, "fit": measure_fit(options) if options.fit_rows else None,
        "state_before": before, "state_after": records.device_state(torch.device(options.device)),
    }  # fmt: skip


def measure_fit(options: KMeansBenchmark) -> dict[str, Any]:
    """One start of a fit over rows in memory, from end to end: seconds of all and of an iteration, the objectives."""
    features, clusters = max(options.features), sorted(options.clusters)[len(options.clusters) // 2]
    x, _ = clip_like(replace(options, rows=options.fit_rows), features, 1)
    iterations: list[float] = []
    start = time.perf_counter()
    result = fit(
        x, clusters, iterations=options.fit_iterations, redos=1, max_points_per_centroid=None,
        backend=options.backend, on_iteration=lambda done: iterations.append(done.seconds),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    iteration = records.quantiles(iterations)
    print(
        f"fit D {features} K {clusters} n {options.fit_rows} {options.dtype} {options.device.upper()}: "
        f"{seconds:.2f} s, an iteration {iteration['p50_ms']:.1f} ms",
        flush=True,
    )
    return {
        "features": features, "clusters": clusters, "rows": options.fit_rows, "seconds": seconds,
        "iteration": iteration, "objectives": result.objectives[0],
    }  # fmt: skip


def measure(options: KMeansBenchmark, features: int, clusters: int) -> dict[str, Any]:
    """All ways on one size, in turn."""
    x, centroids = clip_like(options, features, clusters)
    exact, redecided = kmeans_assign(x, centroids, return_redecided=True, backend=options.backend)
    check(x, centroids, exact)
    ways, skipped = available_ways(x, centroids, options)
    clock = timing.clock_for(x.device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, dict[str, Any]] = {}
    for repeat in range(options.repeats + 2):  # the first two of each are warm-up
        for name, way in ways.items():
            taken, extra_bytes, ids = timed(way, clock)
            if repeat >= 2:
                seconds[name].append(taken)
                equal = (ids == exact).double().mean().item()
                results[name] = {"equal_ids": equal, "peak_extra_bytes": extra_bytes}
    flop = 2 * options.rows * features * clusters
    for name, values in seconds.items():
        quantiles = records.quantiles(values)
        results[name] |= {"timing": quantiles, "tflops": flop / sorted(values)[len(values) // 2] / 1e12}
        equal = results[name]["equal_ids"]
        print(
            f"D {features:4} K {clusters:5} {options.dtype} {options.device.upper()} {name:13} "
            f"{quantiles['p50_ms']:10.3f} ms {results[name]['tflops']:8.3f} TFLOP/s equal ids {equal:.6f}",
            flush=True,
        )
    among_few, among_all = (count / options.rows for count in redecided.tolist())
    return {
        "features": features, "clusters": clusters, "ways": results, "skipped": skipped,
        "redecided_share": {"among_few": among_few, "among_all": among_all},
    }  # fmt: skip


def clip_like(options: KMeansBenchmark, features: int, clusters: int) -> tuple[Tensor, Tensor]:
    """Non-negative rows (n, D) of independent features, which leave many near ties, and fp32 centroids (K, D)."""
    generator = torch.Generator(options.device).manual_seed(0)
    x, centroids = (
        torch.randn(count, features, device=options.device, generator=generator).relu_()
        for count in (options.rows, clusters)
    )
    return x.to(DTYPES[options.dtype]), centroids


def check(x: Tensor, centroids: Tensor, ids: Tensor) -> None:
    """Raise RuntimeError unless a sample of ids is the float64 argmin."""
    for row in range(0, len(x), max(1, len(x) // CHECKED_ROWS)):
        distances = (centroids.double() - x[row].double()).square_().sum(1)
        if distances[ids[row]] > distances.min() * (1 + 4 * x.shape[1] * 2.0**-53):
            raise RuntimeError(f"row {row} has id {ids[row].item()}, the float64 argmin is {distances.argmin().item()}")


def available_ways(
    x: Tensor, centroids: Tensor, options: KMeansBenchmark
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Ways to the ids by name, with inputs prepared as each wants them, and the peers left out with the reason."""
    same = centroids.to(x.dtype)
    ways: dict[str, Callable[[], Tensor]] = {
        "exact": lambda: kmeans_assign(x, centroids, backend=options.backend),
        "fast": lambda: kmeans_assign(x, centroids, exact=False, backend=options.backend),
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


def timed(way: Callable[[], Tensor], clock: timing.Clock) -> tuple[float, int | None, Tensor]:
    """(seconds; peak bytes beyond what was allocated before, None on a CPU; ids)."""
    on_gpu = isinstance(clock, timing.CudaClock)
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    ids, seconds = clock.time(way)
    return seconds, torch.cuda.max_memory_allocated() - before if on_gpu else None, ids
