"""Lloyd's k-means with the settings and repairs of the faiss library's Clustering (1.7).

Same algorithm, other random numbers: compare objectives, not centroids.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mapet_kernels.kmeans.data import Data
from mapet_kernels.kmeans.initial import INITS
from mapet_kernels.kmeans.ranks import Ranks
from mapet_kernels.kmeans.sources import RowSource, as_source
from mapet_kernels.kmeans.split import split_empty
from mapet_kernels.kmeans.state import Best, FitState, read_state, write_state
from mapet_kernels.kmeans.stream import rows_of_a_chunk
from mapet_kernels.kmeans_assign import kmeans_assign
from mapet_kernels.kmeans_update import kmeans_update

REDO_STRIDE = 15_486_557
"""Distance between the seeds of two redos."""
ITERATION_STRIDE = 2_750_159
"""Distance between the seeds of the splits of two iterations."""


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
    """Rows used, after subsampling, over all processes."""


@dataclass(frozen=True)
class Iteration:
    """One finished iteration, for whoever watches.

    Attributes:
        redo, iteration: which, counted from 0.
        objective: sum of squared distances, before the update.
        splits: empty clusters refilled in this iteration.
        seconds: it took.
        eta: seconds until the fit ends, at the mean pace since this call began and if no redo ends early.
    """

    redo: int
    iteration: int
    objective: float
    splits: int
    seconds: float
    eta: float


@dataclass(frozen=True)
class Settings:
    """What decides the result, besides the data. ValueError where it is out of range, TypeError for no number."""

    clusters: int
    iterations: int = 20
    redos: int = 5
    init: str = "random"
    seed: int = 1234
    max_points_per_centroid: int | None = 512
    tolerance: float = 0.0
    exact: bool = True

    def __post_init__(self) -> None:
        limits = {"clusters": self.clusters, "iterations": self.iterations, "redos": self.redos}
        if self.max_points_per_centroid is not None:
            limits["max_points_per_centroid"] = self.max_points_per_centroid
        for name, value in {**limits, "seed": self.seed}.items():
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
        for name, value in limits.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.init not in INITS:
            raise ValueError(f"unknown init {self.init!r}; choose one of {', '.join(INITS)}")
        if not 0.0 <= self.tolerance < 1.0:
            raise ValueError(f"tolerance must be in [0, 1), got {self.tolerance}")

    def generator(self, redo: int, iteration: int = -1) -> torch.Generator:
        """The random numbers of a redo's start, or of the splits of one of its iterations."""
        seed = self.seed + 1 + redo * REDO_STRIDE + (iteration + 1) * ITERATION_STRIDE
        return torch.Generator().manual_seed(seed % 2**63)


@dataclass(frozen=True)
class Pass:
    """What one pass over the rows of all processes gives: sums (K, D) float64, counts (K,) int64, the objective."""

    sums: Tensor
    counts: Tensor
    objective: float


def fit(
    x: Tensor | RowSource | str | os.PathLike | Sequence[str | os.PathLike],
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
    device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
    alone: bool = False,
    chunk_bytes: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_seconds: float = 0.0,
    on_iteration: Callable[[Iteration], None] | None = None,
) -> KMeansResult:
    """Cluster rows (n, D), any floating dtype, into K = clusters under squared L2.

    More than K * max_points_per_centroid rows are first reduced to a random subset of exactly that size (None keeps
    all). Each redo starts from K distinct random rows (init "random") or from greedy k-means++ ("k-means++", which
    reads the rows K times), and runs `iterations` times: assign, sum up the objective, move each centroid to the mean
    of its rows, split a cluster for every empty one. Where that leaves every centroid as it was, the iterations to come
    would do the same, and are taken as done. A redo ends early once an iteration lowers the objective by no more than
    `tolerance` times its value; 0 never does. The redo with the smallest last objective is kept. A cluster to split is
    picked by cycling through them, accepting one of n_j rows with probability (n_j - 1) / (n - K). Random numbers come
    from `seed` alone, drawn on the CPU, so they are the same on every device.

    Rows are worked on in chunks, so memory is that of the rows (if they are in memory) and a few times `chunk_bytes`.

    Several processes. Where torch.distributed is initialised, every process calls this with its own share of the rows
    (`share_of_rows` cuts it) and gets the same result; an iteration costs one all-reduce of K (D + 1) + 1 float64
    numbers. The result is that of one process with all rows, in the order of the ranks, up to the order of sums.

    Args:
        x: a tensor, which may be memory-mapped; .npy files of float16, float32 or float64, in order; or any RowSource.
            What is not on the device is read in every iteration, by a thread that is one chunk ahead.
        exact, backend: as for `kmeans_assign`.
        device: where to work; by default where a tensor is, and torch's default device for files.
        group: processes that share the fit; by default all of them.
        alone: this process works by itself, whatever others there are.
        chunk_bytes: size of a chunk of rows; by default max(4096, 2 K) rows on the CPU and 512 MiB on a GPU.
        checkpoint: file that keeps the state after each iteration, written as a whole or not at all. A call with the
            same file, data and settings goes on from there, to the same bits as an uninterrupted fit (given the same
            device, chunk_bytes and number of processes); after the end it gives the result at once. The first of
            several processes reads and writes it. Costs a checksum over the rows.
        checkpoint_seconds: write it at most so often, and at the end.
        on_iteration: called after each iteration, once the state is safe.

    Raises:
        ValueError: an x that is not (n, D), fewer rows than clusters, rows that are not finite (named), files that are
            truncated or of the wrong kind (named), arguments out of range, a checkpoint that is damaged or of other
            data or settings.
        TypeError: a dtype that is not floating point.
        OSError: a file cannot be read, or the checkpoint not be written.
    """
    settings = Settings(clusters, iterations, redos, init, seed, max_points_per_centroid, tolerance, exact)
    path = _checked_path(checkpoint)
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    source = as_source(x)
    device = pick_device(source, device)
    data = Data(source, Ranks(group, alone=alone), device, rows_of_a_chunk(source, device, clusters, chunk_bytes))
    if data.rows < clusters:
        raise ValueError(f"{clusters} clusters need at least {clusters} rows, got {data.rows}")
    checksum = data.check(checksum=path is not None)
    identity = {
        **asdict(settings),
        "rows": data.rows,
        "features": data.features,
        "dtype": str(source.dtype),
        "checksum of x": checksum,
    }
    state = FitState()
    if path is not None:
        state = data.ranks.from_first(lambda: read_state(path, identity)) or state
    if max_points_per_centroid is not None:
        data = data.subset(clusters * max_points_per_centroid, seed)
    keep = _Keeper(path if data.ranks.rank == 0 else None, checkpoint_seconds, identity)
    _run(data, settings, state, backend, keep, on_iteration)
    best = state.best
    return KMeansResult(
        centroids=best.centroids.to(data.device).float(),
        objective=best.objective,
        objectives=tuple(map(tuple, state.objectives)),
        counts=best.counts.to(data.device),
        splits=best.splits,
        redo=best.redo,
        rows=data.rows,
    )


def _run(
    data: Data,
    settings: Settings,
    state: FitState,
    backend: str,
    keep: Callable[[FitState], None],
    on_iteration: Callable[[Iteration], None] | None,
) -> None:
    """Bring the state from wherever it is to the end."""
    begun = last = time.monotonic()
    done = 0
    while state.redo < settings.redos:
        redo, iteration = state.redo, len(state.curve)
        if state.centroids is None:
            state.centroids = INITS[settings.init](data, settings.clusters, settings.generator(redo))
        found = one_pass(data, state.centroids.to(data.device), settings.exact, backend)
        centroids = (found.sums / found.counts.clamp(min=1)[:, None]).to(data.working)
        splits = split_empty(centroids, found.counts, settings.generator(redo, iteration))
        _advance(state, settings, found, centroids, splits)
        keep(state)
        now, done = time.monotonic(), done + 1
        if on_iteration is not None:
            left = (settings.redos - state.redo) * settings.iterations - len(state.curve)
            eta = (now - begun) / done * left
            on_iteration(Iteration(redo, iteration, found.objective, splits, now - last, eta))
        last = now


def _advance(state: FitState, settings: Settings, found: Pass, centroids: Tensor, splits: int) -> None:
    """Take an iteration into the state; after the last of a redo, keep the better result and go to the next redo."""
    state.curve.append(found.objective)
    stays = not splits and _stays(centroids, state.centroids)
    while stays and not _ended(state.curve, settings):
        state.curve.append(found.objective)
    state.splits += splits
    state.centroids = centroids
    if not _ended(state.curve, settings):
        return
    if state.best is None or found.objective < state.best.objective:
        state.best = Best(centroids, found.objective, found.counts, state.splits, state.redo)
    state.objectives.append(state.curve)
    state.redo, state.curve, state.splits, state.centroids = state.redo + 1, [], 0, None


def _stays(centroids: Tensor, before: Tensor) -> bool:
    """Whether an update moved no centroid."""
    return torch.equal(centroids, before.to(centroids))


def _ended(curve: list[float], settings: Settings) -> bool:
    """Whether a redo with these objectives is over."""
    tolerance = settings.tolerance
    converged = tolerance > 0 and len(curve) > 1 and curve[-2] - curve[-1] <= tolerance * curve[-2]
    return converged or len(curve) >= settings.iterations


def one_pass(data: Data, centroids: Tensor, exact: bool, backend: str) -> Pass:
    """Assign every row to its nearest centroid (K, D) and add up; over several processes one all-reduce."""
    clusters, features = centroids.shape
    # One tensor for one all-reduce; float64 holds every count exactly.
    total = torch.zeros(clusters * features + clusters + 1, dtype=torch.float64, device=data.device)
    sums, shared_counts, objective = total.split([clusters * features, clusters, 1])
    sums = sums.view(clusters, features)
    counts = torch.zeros(clusters, dtype=torch.int64, device=data.device)
    update_backend = "auto" if backend == "cuda" else backend  # sums need no kernel in CUDA C++
    for _, rows in data.chunks():
        ids, distances = kmeans_assign(rows, centroids, exact=exact, return_distance=True, backend=backend)
        objective += distances.sum(dtype=torch.float64)
        # Ids of our own: no need to look at them, which would wait for the device twice a chunk.
        kmeans_update(rows, ids, clusters, out=(sums, counts), check_ids=False, backend=update_backend)
    shared_counts.copy_(counts)
    data.ranks.sum(total)
    return Pass(sums, shared_counts.long(), objective.item())


class _Keeper:
    """Writes the state to the file, if there is one, at most every so many seconds and at the end."""

    def __init__(self, path: Path | None, every: float, identity: dict[str, Any]) -> None:
        self.path, self.every, self.identity = path, every, identity
        self.last = time.monotonic()

    def __call__(self, state: FitState) -> None:
        finished = state.redo == self.identity["redos"]
        if self.path is not None and (finished or time.monotonic() - self.last >= self.every):
            write_state(self.path, state, self.identity)
            self.last = time.monotonic()


def _checked_path(checkpoint: str | os.PathLike | None) -> Path | None:
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ValueError(f"checkpoint {path} must be a file in a folder that exists")
    return path


def pick_device(source: RowSource, device: torch.device | str | None) -> torch.device:
    """The device to work on, with its number: as asked for, or where a tensor is, or torch's default for files."""
    chosen = device if device is not None else source.device if source.resident else torch.get_default_device()
    return torch.empty(0, device=chosen).device
