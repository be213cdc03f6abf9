"""k-means under scikit-learn's names, for those who are used to them. Needs neither scikit-learn nor numpy."""

from __future__ import annotations

import secrets
import warnings
from typing import Any, Self

import torch
from torch import Tensor

from mapet_kernels.kmeans.data import Data
from mapet_kernels.kmeans.lloyd import fit, pick_device
from mapet_kernels.kmeans.ranks import Ranks
from mapet_kernels.kmeans.sources import as_source
from mapet_kernels.kmeans.stream import rows_of_a_chunk
from mapet_kernels.kmeans_assign import kmeans_assign


class NotFittedError(ValueError, AttributeError):
    """predict before fit; of the same kinds as scikit-learn's error of that name."""


class KMeans:
    """Clusters under squared L2, by `mapet_kernels.kmeans.fit` over all rows.

    Arguments are those of scikit-learn's KMeans, with these differences: `tol` is the relative change of the objective
    at which a run ends; `init` is a name, not an array; `random_state` is an int or None; sample weights are not taken.

    Args:
        n_clusters: K.
        init: "k-means++" (greedy) or "random".
        n_init: runs, of which the best is kept; "auto" is 1 for k-means++ and 10 for random.
        max_iter: iterations of a run at most.
        device: where to work; by default where the rows are.

    Attributes, after `fit`, as numpy arrays where numpy arrays were given, else as tensors on the device:
        cluster_centers_: (K, D), float32.
        labels_: (n,) int64, the nearest centre of every row; in several processes of their own rows.
        inertia_: sum of squared distances to the centres, over all rows.
        n_iter_: iterations of the run kept.
        n_features_in_: D.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: str = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.n_clusters, self.init, self.n_init = n_clusters, init, n_init
        self.max_iter, self.tol, self.random_state, self.device = max_iter, tol, random_state, device

    def fit(self, X: Any, y: object = None) -> Self:
        """Find the centres of rows X (n, D): a tensor, a numpy array (also memory-mapped) or nested lists.

        y is ignored. ValueError and TypeError as for `mapet_kernels.kmeans.fit`.
        """
        rows = _rows(X)
        result = fit(
            rows,
            self.n_clusters,
            iterations=self.max_iter,
            redos=self._runs(),
            init=self.init,
            seed=Ranks().from_first(self._seed),
            max_points_per_centroid=None,
            tolerance=self.tol,
            device=self.device,
        )
        data = self._data(rows, Ranks())
        labels, inertia = _assign(data, result.centroids)
        self.cluster_centers_, self.labels_ = (_like(X, values) for values in (result.centroids, labels))
        self.inertia_ = data.ranks.sum(inertia).item()
        self.n_iter_, self.n_features_in_ = len(result.objectives[result.redo]), data.features
        return self

    def predict(self, X: Any) -> Any:
        """The nearest centre of every row of X (n, D), (n,) int64. NotFittedError before `fit`."""
        if not hasattr(self, "cluster_centers_"):
            raise NotFittedError("this KMeans is not fitted yet: call fit first")
        rows = _rows(X)
        if rows.dim() != 2 or rows.shape[1] != self.n_features_in_:
            raise ValueError(f"X must be (rows, {self.n_features_in_}) as in fit, got shape {tuple(rows.shape)}")
        data = self._data(rows, Ranks(alone=True))
        return _like(X, _assign(data, torch.as_tensor(self.cluster_centers_, device=data.device))[0])

    def fit_predict(self, X: Any, y: object = None) -> Any:
        """`fit`, then the labels of the same rows."""
        return self.fit(X).labels_

    def _data(self, rows: Tensor, ranks: Ranks) -> Data:
        source = as_source(rows)
        device = pick_device(source, self.device)
        return Data(source, ranks, device, rows_of_a_chunk(source, device, self.n_clusters, None))

    def _runs(self) -> int:
        if self.n_init == "auto":
            return 1 if self.init == "k-means++" else 10
        if not isinstance(self.n_init, int):
            raise ValueError(f'n_init must be a number or "auto", got {self.n_init!r}')
        return self.n_init

    def _seed(self) -> int:
        if self.random_state is None:
            return secrets.randbits(32)
        if not isinstance(self.random_state, int):
            raise TypeError(f"random_state must be an int or None, got {type(self.random_state).__name__}")
        return self.random_state


def _rows(values: Any) -> Tensor:
    """A tensor of what a scikit-learn user has; integers become float64, as they do there."""
    with warnings.catch_warnings():
        # A read-only array, such as a memory-mapped one, is only read.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        rows = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    return rows if rows.is_floating_point() else rows.to(torch.float64)


def _like(given: Any, values: Tensor) -> Any:
    return values if isinstance(given, Tensor) else values.cpu().numpy()


def _assign(data: Data, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """ids (n,) of this process's rows, and the sum of their squared distances, float64."""
    ids = torch.empty(data.source.shape[0], dtype=torch.int64, device=data.device)
    total = torch.zeros((), dtype=torch.float64, device=data.device)
    for start, rows in data.chunks():
        few = slice(start, start + len(rows))
        ids[few], distances = kmeans_assign(rows, centroids, return_distance=True)
        total += distances.sum(dtype=torch.float64)
    return ids, total
