"""The k-means suites: they run small on a CPU, say what they left out, and time nothing that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_bench_suites import RULES, small

from bench import kmeans, kmeans_fit
from bench.contest import measure
from bench.options import Options

CPU = torch.device("cpu")


def test_a_small_run_on_the_cpu(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(kmeans.SIZES, "cpu", ((8, 16, 200),))
    (entry,) = small("kmeans", tmp_path)["contests"]
    ways = entry["ways"]
    assert set(ways) == set(kmeans.WAYS) and ways["exact"]["equal_ids"] == 1.0
    assert {ways[name]["status"] for name in ("exact", "fast", "torch_chunked")} == {"timed"}
    assert ways["flash_kmeans"]["status"] == ways["faiss_gpu"]["status"] == "unavailable"
    assert ways["exact"]["tflop_per_s"]["assign"] > 0
    assert 0 <= ways["exact"]["redecided_share"]["among_few"] <= 1


def test_wrong_ids_are_not_timed(monkeypatch) -> None:
    monkeypatch.setitem(kmeans.SIZES, "cpu", ((8, 16, 200),))
    monkeypatch.setattr(kmeans, "chunked_argmin", lambda x, centroids: torch.full((200,), 3))
    (contest,) = kmeans.contests(Options(dtype=("fp32",)), CPU)
    rows = measure(contest, RULES)["ways"]
    assert rows["torch_chunked"]["status"] == "wrong" and rows["exact"]["status"] == "timed"


@pytest.mark.parametrize("worse", [False, True])
def test_fits_are_held_against_the_best_peer(worse: bool, monkeypatch) -> None:
    monkeypatch.setitem(kmeans_fit.DATA, "cpu", {"mixture": (200, 4, 5, 2)})
    monkeypatch.setattr(kmeans_fit, "SEEDS", 2)
    if worse:
        fits = kmeans_fit.fits
        bad = {kmeans_fit.OURS: lambda x, seed: x[:5] + 1}
        monkeypatch.setattr(kmeans_fit, "fits", lambda *arguments: fits(*arguments) | bad)
    (contest,) = kmeans_fit.contests(Options(), CPU)
    rows = measure(contest, RULES)["ways"]
    assert rows["scikit-learn_k-means++"]["status"] == "timed"
    assert rows["scikit-learn_k-means++"]["error_share"] == {"finite": 0.0}
    assert rows[kmeans_fit.OURS]["status"] == ("wrong" if worse else "timed")
    assert worse or len(rows[kmeans_fit.OURS]["objectives"]) == 2
