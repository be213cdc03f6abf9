"""The estimator KMeans, and the objectives of fits beside those of scikit-learn and faiss."""

import importlib.util
import math

import numpy as np
import pytest
import sklearn.cluster
import torch
from sklearn.datasets import load_digits
from test_kmeans_fit import mixture
from torch import Tensor

from mapet_kernels import kmeans, kmeans_assign
from mapet_kernels.kmeans import KMeans, NotFittedError


class TestEstimator:
    x = load_digits().data

    def test_it_does_what_scikit_learn_does(self):
        ours, peer = (kind(10, n_init=4, random_state=0).fit(self.x) for kind in (KMeans, sklearn.cluster.KMeans))
        assert ours.inertia_ == pytest.approx(peer.inertia_, rel=0.005)
        for name in ("labels_", "cluster_centers_"):
            assert isinstance(getattr(ours, name), np.ndarray)
            assert getattr(ours, name).shape == getattr(peer, name).shape
        assert 1 < ours.n_iter_ < 300
        assert ours.n_features_in_ == 64
        exact = np.square(self.x[:, None] - ours.cluster_centers_.astype(np.float64)).sum(2)
        assert np.array_equal(ours.labels_, exact.argmin(1))
        assert ours.inertia_ == pytest.approx(exact.min(1).sum(), rel=1e-6)
        assert np.array_equal(ours.predict(self.x), ours.labels_)

    def test_tensors_give_tensors(self):
        x = torch.from_numpy(self.x).float()
        fitted = KMeans(5, random_state=0, init="random", n_init=2, max_iter=7, tol=0).fit(x)
        assert all(isinstance(value, Tensor) for value in (fitted.labels_, fitted.cluster_centers_))
        assert fitted.n_iter_ == 7
        again = KMeans(5, random_state=0, init="random", n_init=2, max_iter=7, tol=0)
        assert torch.equal(again.fit_predict(x), fitted.labels_)

    def test_integers_lists_and_read_only_arrays(self, tmp_path, recwarn):
        centres = [[0, 0], [10, 10]]
        for rows in (centres * 5, np.array(centres * 5), frozen(np.array(centres * 5, np.float32))):
            fitted = KMeans(2, random_state=0).fit(rows)
            assert sorted(fitted.cluster_centers_.tolist()) == centres
            assert fitted.inertia_ == 0
            assert len(set(fitted.predict([[1, 1], [9, 9]]).tolist())) == 2
        assert not recwarn.list

    def test_random_state_none_differs(self):
        x = self.x[:200]
        runs = [KMeans(20, max_iter=2, n_init=1, init="random").fit(x).cluster_centers_ for _ in range(2)]
        assert not np.array_equal(*runs)

    @pytest.mark.parametrize("kind", [ValueError, AttributeError])
    def test_predict_before_fit(self, kind):
        with pytest.raises(kind, match="this KMeans is not fitted yet: call fit first") as error:
            KMeans().predict(self.x)
        assert isinstance(error.value, NotFittedError)

    @pytest.mark.parametrize(
        ("arguments", "rows", "error", "text"),
        [
            ({"n_clusters": 6}, [[0.0, 1]] * 5, ValueError, "6 clusters need at least 6 rows, got 5"),
            ({"n_clusters": 2}, [0.0, 1], ValueError, r"x must be \(rows, features\)"),
            ({"n_clusters": 2}, [[0.0], [math.nan]], ValueError, "x must be finite, but 1 of its rows"),
            ({"n_clusters": 2, "n_init": "many"}, [[0.0], [1.0]], ValueError, 'n_init must be a number or "auto"'),
            ({"n_clusters": 2, "random_state": "x"}, [[0.0], [1.0]], TypeError, "random_state must be an int or None"),
            ({"n_clusters": 2, "init": "grid"}, [[0.0], [1.0]], ValueError, "unknown init 'grid'"),
        ],
    )
    def test_fit_refuses(self, arguments, rows, error, text):
        with pytest.raises(error, match=text):
            KMeans(**arguments).fit(rows)

    def test_predict_refuses_other_features(self):
        with pytest.raises(ValueError, match=r"X must be \(rows, 64\) as in fit, got shape \(3, 63\)"):
            KMeans(2, n_init=1).fit(self.x[:50]).predict(self.x[:3, :63])


def frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


PEER_DATA = {
    "digits": lambda: (torch.from_numpy(load_digits().data).float(), 10),
    "mixture": lambda: (mixture(20_000, features=64, parts=500), 16),
}


@pytest.mark.parametrize("data", PEER_DATA)
def test_the_objective_is_no_worse_than_the_peers(data):
    """Five seeds, best of 2 starts of 20 iterations; `python -m bench kmeans-fit` is the same with 200,000 rows."""
    x, clusters = PEER_DATA[data]()
    for seed in range(5):
        ours = kmeans.fit(x, clusters, init="k-means++", redos=2, seed=seed)
        error = kmeans_assign(x, ours.centroids, return_distance=True)[1].sum(dtype=torch.float64).item()
        assert error <= 1.005 * min(peer_errors(x.numpy(), clusters, seed))


def peer_errors(x: np.ndarray, clusters: int, seed: int) -> list[float]:
    """Sums of squared distances to the final centres of scikit-learn, and of faiss where it is installed."""
    peer = sklearn.cluster.KMeans(clusters, n_init=2, max_iter=20, tol=0, random_state=seed)
    centres = [peer.fit(x).cluster_centers_]
    if importlib.util.find_spec("faiss"):
        import faiss

        peer = faiss.Kmeans(x.shape[1], clusters, niter=20, nredo=2, seed=seed, max_points_per_centroid=len(x))
        peer.train(x)
        centres.append(peer.centroids)
    rows = torch.from_numpy(x).double()
    return [torch.cdist(rows, torch.from_numpy(c).double()).min(1).values.square().sum().item() for c in centres]
