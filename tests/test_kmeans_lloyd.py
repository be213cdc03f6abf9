"""kmeans.fit on rows in memory: Lloyd as faiss runs it."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from test_kmeans import DTYPES, randn
from test_kmeans_fit import mixture, same_result
from torch import Tensor

from mapet_kernels import kmeans, kmeans_assign
from mapet_kernels.kmeans import lloyd
from mapet_kernels.kmeans.split import pick_cluster, split_empty


def blobs(clusters: int, rows: int, features: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(clusters, features, generator=generator) * 10
    return centres[torch.arange(rows) % clusters] + torch.randn(rows, features, generator=generator)


def test_fit_is_as_good_as_scikit_learn() -> None:
    x = blobs(20, 2000)
    result = kmeans.fit(x, 20, init="k-means++", redos=4)
    peer = KMeans(20, init="k-means++", n_init=4, max_iter=20, random_state=0).fit(x.numpy())
    assert result.objective == pytest.approx(peer.inertia_, rel=0.01)
    assert result.centroids.shape == (20, 16)
    assert result.centroids.dtype == torch.float32
    assert result.counts.tolist() == [100] * 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_fit_finds_well_separated_centres_in_every_dtype(dtype: torch.dtype) -> None:
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    x = (centres.repeat(50, 1) + 0.1 * randn(150, 2)).to(dtype)
    result = kmeans.fit(x, 3, init="k-means++", redos=2, iterations=5)
    found = result.centroids[result.centroids.norm(dim=1).argsort()]
    nearest = torch.cdist(found, centres).min(1)
    assert nearest.values.max() < 0.1
    assert sorted(nearest.indices.tolist()) == [0, 1, 2]


def test_fit_keeps_the_best_redo_and_never_worsens() -> None:
    calls = []
    result = kmeans.fit(blobs(12, 600), 12, redos=3, iterations=6, on_iteration=calls.append)
    for redo, curve in enumerate(result.objectives):
        told = [call for call in calls if call.redo == redo]
        assert [call.iteration for call in told] == list(range(len(told))) and len(curve) == 6
        assert [call.objective for call in told] == list(curve[: len(told)])
        assert set(curve[len(told) :]) <= {curve[len(told) - 1]}, "nothing changes any more"
    last = [curve[-1] for curve in result.objectives]
    assert len(set(last)) > 1
    assert result.objective == min(last)
    assert result.redo == last.index(min(last))
    assert result.splits == 0
    for curve in result.objectives:
        assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(curve))


def test_fit_objective_is_measured_before_the_last_update() -> None:
    x = blobs(8, 400)
    one, two = (kmeans.fit(x, 8, redos=1, iterations=steps) for steps in (1, 2))
    distances = kmeans_assign(x, one.centroids, return_distance=True)[1]
    assert two.objective == pytest.approx(distances.double().sum().item(), rel=1e-6)
    assert one.objective > two.objective


def test_fit_depends_on_the_seed_alone() -> None:
    x = blobs(10, 300)
    state = torch.get_rng_state()
    first, again = kmeans.fit(x, 10, redos=2, iterations=4), kmeans.fit(x, 10, redos=2, iterations=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.centroids, again.centroids)
    assert first.objectives == again.objectives
    assert kmeans.fit(x, 10, redos=2, iterations=4, seed=5).objectives != first.objectives


def test_fit_subsamples() -> None:
    x = blobs(5, 1000)
    assert kmeans.fit(x, 5, max_points_per_centroid=20, redos=1, iterations=2).rows == 100
    assert kmeans.fit(x, 5, max_points_per_centroid=None, redos=1, iterations=2).rows == 1000


def test_fit_splits_a_cluster_for_every_empty_one() -> None:
    # 90 equal rows and 10 others: a random start repeats the common row, and the repeats win no rows.
    x = torch.cat([torch.zeros(90, 4), 5 + randn(10, 4)])
    result = kmeans.fit(x, 6, redos=1, iterations=15)
    assert result.splits > 0
    assert result.counts.sum() == 100
    assert result.centroids.isfinite().all()


def test_a_split_moves_two_halves_apart_as_faiss_does() -> None:
    centroids, counts = torch.tensor([[8.0, 8, 8], [1, 1, 1]]), torch.tensor([20, 0])
    assert split_empty(centroids, counts, torch.Generator().manual_seed(0)) == 1
    step = 8 / 1024
    assert centroids.tolist() == [[8 - step, 8 + step, 8 - step], [8 + step, 8 - step, 8 + step]]


def test_the_cluster_to_split_is_drawn_in_proportion_to_its_size() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 31, 11, 0]
    drawn = np.bincount([pick_cluster(sizes, 400, generator) for _ in range(2000)], minlength=4)
    assert drawn[0] == drawn[3] == 0
    assert drawn[1] / drawn[2] == pytest.approx(3, rel=0.2)


def test_fit_of_equal_rows_ends() -> None:
    for init in ("random", "k-means++"):
        result = kmeans.fit(torch.full((50, 3), 7.0), 10, redos=1, iterations=3, init=init)
        assert result.counts.sum() == 50
        assert result.centroids.isfinite().all()


def test_fit_of_as_many_rows_as_clusters_is_the_rows() -> None:
    x = randn(7, 3)
    result = kmeans.fit(x, 7, redos=1, iterations=2)
    assert result.objective == 0
    assert sorted(result.centroids.tolist()) == sorted(x.tolist())


def test_fit_stops_at_the_tolerance() -> None:
    x = blobs(10, 500)
    (curve,) = kmeans.fit(x, 10, redos=1, iterations=50, tolerance=1e-3).objectives
    assert 2 <= len(curve) < 50
    assert curve[-2] - curve[-1] <= 1e-3 * curve[-2]


def test_fit_with_a_large_offset_is_the_fit_without() -> None:
    x = (blobs(6, 300) * 64).round() / 64
    plain, moved = (kmeans.fit(x + shift, 6, redos=1, iterations=5) for shift in (0, 4096))
    assert torch.equal(plain.counts, moved.counts)
    assert moved.objective == pytest.approx(plain.objective, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"clusters": 11}, "11 clusters need at least 11 rows, got 10"),
        ({"clusters": 0}, "clusters must be at least 1, got 0"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"redos": 0}, "redos must be at least 1"),
        ({"max_points_per_centroid": 0}, "max_points_per_centroid must be at least 1"),
        ({"init": "kmeans"}, "unknown init 'kmeans'; choose one of random, k-means"),
        ({"tolerance": -1.0}, r"tolerance must be in \[0, 1\)"),
        ({"x": torch.zeros(10)}, r"x must be \(rows, features\)"),
        ({"x": torch.full((10, 2), float("nan"))}, "x must be finite, but 10 of its rows"),
    ],
)
def test_fit_refuses(changes: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        kmeans.fit(**{"x": randn(10, 2), "clusters": 3, **changes})


@pytest.mark.parametrize("tolerance", [0.0, 1e-12])
def test_iterations_that_would_change_nothing_are_not_run(monkeypatch: pytest.MonkeyPatch, tolerance: float) -> None:
    x, options = mixture(2000, parts=12, spread=0.05), {"redos": 3, "iterations": 30, "seed": 5, "tolerance": tolerance}
    seen: list[kmeans.Iteration] = []
    stopping = kmeans.fit(x, 12, **options, on_iteration=seen.append)
    assert len(seen) < 45 and [done.redo for done in seen] == sorted(done.redo for done in seen)
    assert seen[-1].redo == 2 and seen[-1].eta == 0
    assert all(len(curve) == 30 for curve in stopping.objectives) or tolerance
    every: list[kmeans.Iteration] = []
    monkeypatch.setattr(lloyd, "_stays", lambda centroids, before: False)
    same_result(stopping, kmeans.fit(x, 12, **options, on_iteration=every.append))
    assert len(every) == sum(map(len, stopping.objectives)) > len(seen)
