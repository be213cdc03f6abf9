"""k-means fits against scikit-learn and faiss on the CPU: the objective over several seeds, and how long it takes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sklearn.cluster
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from bench.records import device_state, quantiles
from mapet_kernels import kmeans, kmeans_assign

LIMIT = 1.005
"""The objective may be so many times the best of the peers'."""


@dataclass(frozen=True)
class KMeansFitBenchmark:
    """k-means fits beside scikit-learn and faiss on the CPU, with the same redos and iterations, on all rows."""

    data: str = "mixture"
    """mixture or digits."""
    rows: int = 200_000
    features: int = 64
    parts: int = 1000
    """Gaussian clouds in the mixture, with the spread of their centres."""
    clusters: int = 256
    seeds: int = 5
    redos: int = 5
    iterations: int = 20


def run(options: KMeansFitBenchmark) -> dict[str, Any]:
    """Fit with every library and seed in turn. Objectives are those of the final centroids, in float64.

    `worst_ratio` is the largest, over the seeds, of our k-means++ objective over the best peer's; `within_limit` says
    whether it is at most 1.005.
    """
    before = device_state(torch.device("cpu"))
    x, clusters = _data(options)
    fits = _fits(options, clusters)
    objectives: dict[str, list[float]] = {name: [] for name in fits}
    seconds: dict[str, list[float]] = {name: [] for name in fits}
    for seed in range(options.seeds):
        for name, fit in fits.items():
            start = time.perf_counter()
            centroids = fit(x, seed)
            seconds[name].append(time.perf_counter() - start)
            objectives[name].append(_objective(x, centroids))
    peers = [name for name in fits if not name.startswith("ours")]
    best = [min(objectives[name][seed] for name in peers) for seed in range(options.seeds)]
    ratios = {name: [value / b for value, b in zip(objectives[name], best, strict=True)] for name in fits}
    return {
        "data": options.data, "rows": len(x), "features": x.shape[1], "clusters": clusters, "parts": options.parts,
        "redos": options.redos, "iterations": options.iterations, "seeds": options.seeds, "peers": _versions(),
        "objectives": objectives,
        "ratio_to_best_peer": {name: [round(ratio, 5) for ratio in values] for name, values in ratios.items()},
        "median_ratio": {name: round(statistics.median(values), 5) for name, values in ratios.items()},
        "worst_ratio": round(max(ratios["ours k-means++"]), 5),
        "within_limit": max(ratios["ours k-means++"]) <= LIMIT,
        "timings": {name: quantiles(values) for name, values in seconds.items()},
        "measured_on": "cpu", "state_before": before, "state_after": device_state(torch.device("cpu")),
    }  # fmt: skip


def _data(options: KMeansFitBenchmark) -> tuple[Tensor, int]:
    if options.data == "digits":
        return torch.from_numpy(load_digits().data).float(), 10
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(options.parts, options.features, generator=generator)
    drawn = centres[torch.randint(options.parts, (options.rows,), generator=generator)]
    return drawn + torch.randn(options.rows, options.features, generator=generator), options.clusters


def _fits(options: KMeansFitBenchmark, clusters: int) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Fits by name, each (rows, seed) -> centroids."""
    same = {"iterations": options.iterations, "redos": options.redos, "max_points_per_centroid": None}

    def ours(init: str) -> Callable[[Tensor, int], Tensor]:
        return lambda x, seed: kmeans.fit(x, clusters, init=init, seed=seed, **same).centroids

    def scikit_learn(x: Tensor, seed: int) -> Tensor:
        peer = sklearn.cluster.KMeans(
            clusters, n_init=options.redos, max_iter=options.iterations, tol=0, random_state=seed
        )
        return torch.from_numpy(peer.fit(x.numpy()).cluster_centers_)

    def faiss_cpu(x: Tensor, seed: int) -> Tensor:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        peer = faiss.Kmeans(
            x.shape[1],
            clusters,
            niter=options.iterations,
            nredo=options.redos,
            seed=seed,
            max_points_per_centroid=len(x),
        )
        peer.train(x.numpy())
        return torch.from_numpy(peer.centroids)

    fits = {"ours random": ours("random"), "ours k-means++": ours("k-means++"), "scikit-learn k-means++": scikit_learn}
    return {**fits, "faiss random": faiss_cpu} if importlib.util.find_spec("faiss") else fits


def _objective(x: Tensor, centroids: Tensor) -> float:
    return kmeans_assign(x, centroids, return_distance=True)[1].sum(dtype=torch.float64).item()


def _versions() -> dict[str, str]:
    names = ("scikit-learn", "faiss-cpu")
    installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in names if name in installed}
