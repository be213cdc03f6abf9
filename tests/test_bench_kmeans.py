"""The k-means benchmark: it runs small on a CPU, says what it left out, and times nothing that is wrong."""

from __future__ import annotations

import pytest
import torch

from bench import kmeans

SMALL = kmeans.KMeansBenchmark(features=(8,), clusters=(16,), rows=200, repeats=2, device="cpu", record=False)


def test_a_small_run_on_the_cpu(capsys: pytest.CaptureFixture) -> None:
    results = kmeans.run(SMALL)
    (size,) = results["sizes"]
    assert results["device_type"] == "cpu"
    assert {"exact", "fast", "torch_chunked"} <= size["ways"].keys()
    assert size["ways"].keys() | size["skipped"].keys() >= {"flash_kmeans", "faiss_gpu"}
    assert size["ways"]["exact"]["equal_ids"] == 1.0
    for way in size["ways"].values():
        assert way["tflops"] > 0 and way["timing"]["repeats"] == 2
    assert 0 <= size["redecided_share"]["among_few"] <= 1
    assert "CPU exact" in capsys.readouterr().out


def test_wrong_ids_are_not_timed() -> None:
    x, centroids = kmeans.clip_like(SMALL, 8, 16)
    with pytest.raises(RuntimeError, match=r"row \d+ has id 3, the float64 argmin is"):
        kmeans.check(x, centroids, torch.full((200,), 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_reason_is_given() -> None:
    with pytest.raises(ValueError, match="no CUDA device; --device cpu"):
        kmeans.run(kmeans.KMeansBenchmark())
