"""k-means fits beside scikit-learn and faiss, with the same redos and iterations, on all rows.

What is checked is the objective of the final centroids, in float64, over several seeds: k-means++ of ours may not be
more than half a per cent above the best of the peers. Peers work on the CPU; on a GPU ours is timed alone, as larger.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor

from bench.contest import Arena, Contest, Entrant, Timed
from bench.guard import Unavailable
from bench.options import Options
from mapet_kernels import kmeans, kmeans_assign

LIMIT = 0.005
"""By how much the objective may exceed the best of the peers', relative to it."""
OURS = "ours_k-means++"
PEERS = ("scikit-learn_k-means++", "faiss_random")
WAYS = (*PEERS, OURS, "ours_random")
CLOUDS = 1000
"""Gaussian clouds in the mixture, with the spread of their centres."""
DATA = {
    "cpu": {"mixture": (200_000, 64, 256, 5), "digits": (1797, 64, 10, 5)},
    "cuda": {"mixture": (262_144, 4096, 8192, 1)},
}
"""By device type and name: rows, features, clusters, redos."""
SEEDS, ITERATIONS = 5, 20


def contests(chosen: Options, device: torch.device) -> list[Contest]:
    """One for each data set."""
    return [
        Contest(
            "kmeans_fit", f"{name} n {rows} D {features} K {clusters}",
            {"rows": rows, "features": features, "clusters": clusters, "redos": redos, "iterations": ITERATIONS},
            ("fit",), WAYS, OURS, "fp32", partial(arena, name, rows, features, clusters, redos, device),
        )
        for name, (rows, features, clusters, redos) in DATA[device.type].items()
    ]  # fmt: skip


@contextmanager
def arena(name: str, rows: int, features: int, clusters: int, redos: int, device: torch.device) -> Iterator[Arena]:
    """The rows, and the best objective of the peers for each seed, as it comes to be known."""
    x = digits() if name == "digits" else mixture(rows, features, device)
    best: list[float] = []

    def entrant(way: str) -> Entrant:
        if way in PEERS and device.type != "cpu":
            raise Unavailable("works on the CPU")
        fit, seeds = fits(clusters, redos)[way], itertools.cycle(range(SEEDS))
        found: list[float] = []

        def results() -> tuple[str, list[float]]:
            found.extend(objective(x, fit(x, seed)) for seed in range(SEEDS))
            return way, found

        timed = Timed(lambda seed: fit(x, seed), lambda: (next(seeds),))
        checked = results if device.type == "cpu" else None
        return Entrant({"fit": timed}, checked, facts=lambda: {"objectives": found})

    def judge(results: tuple[str, list[float]]) -> dict[str, float]:
        way, objectives = results
        if way == OURS:
            if not best:
                raise Unavailable("no peer was fitted to compare with")
            return {"objective": max(mine / peer - 1 for mine, peer in zip(objectives, best, strict=True)) / LIMIT}
        if way in PEERS:
            best[:] = map(min, best or objectives, objectives)
        return {"finite": 0.0 if torch.tensor(objectives).isfinite().all() else float("inf")}

    yield Arena({way: partial(entrant, way) for way in WAYS}, judge)


def digits() -> Tensor:
    """scikit-learn's digits, 8 x 8."""
    return torch.from_numpy(load_digits().data).float()


def mixture(rows: int, features: int, device: torch.device) -> Tensor:
    """Rows of CLOUDS Gaussian clouds."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    chosen = torch.randint(CLOUDS, (rows,), generator=generator, device=device)
    return draw(CLOUDS, features)[chosen] + draw(rows, features)


def fits(clusters: int, redos: int) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Fits by name, each (rows, seed) -> centroids."""

    def ours(init: str, x: Tensor, seed: int) -> Tensor:
        same = {"seed": seed, "iterations": ITERATIONS, "redos": redos}
        return kmeans.fit(x, clusters, init=init, max_points_per_centroid=None, **same).centroids

    def scikit_learn(x: Tensor, seed: int) -> Tensor:
        peer = KMeans(clusters, n_init=redos, max_iter=ITERATIONS, tol=0, random_state=seed)
        return torch.from_numpy(peer.fit(x.numpy()).cluster_centers_)

    def faiss_cpu(x: Tensor, seed: int) -> Tensor:
        if importlib.util.find_spec("faiss") is None:
            raise Unavailable("not installed")
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        same = {"niter": ITERATIONS, "nredo": redos, "seed": seed, "max_points_per_centroid": len(x)}
        peer = faiss.Kmeans(x.shape[1], clusters, **same)
        peer.train(x.numpy())
        return torch.from_numpy(peer.centroids)

    return dict(zip(WAYS, (scikit_learn, faiss_cpu, partial(ours, "k-means++"), partial(ours, "random")), strict=True))


def objective(x: Tensor, centroids: Tensor) -> float:
    """Sum of squared distances to the nearest centroids."""
    return kmeans_assign(x, centroids, return_distance=True)[1].sum(dtype=torch.float64).item()
