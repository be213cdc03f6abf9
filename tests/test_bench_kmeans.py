"""The k-means benchmark: it runs small on a CPU, says what it left out, and times nothing that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import matplotlib.image as mpimg
import pytest
import torch

from bench import kmeans, kmeans_plot

SMALL = kmeans.KMeansBenchmark(
    features=(8,), clusters=(16,), rows=200, repeats=2, fit_rows=300, fit_iterations=3, device="cpu"
)


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
    assert len(results["fit"]["objectives"]) == 3 and results["fit"]["seconds"] > 0
    assert "CPU exact" in capsys.readouterr().out


def test_a_record_has_a_picture(tmp_path: Path) -> None:
    replace(SMALL, clusters=(16, 5), output=tmp_path, fit_rows=0).run()
    (record,) = tmp_path.glob("kmeans_*.json")
    picture = mpimg.imread(record.with_suffix(".png"))
    assert picture[..., :3].std() > 0.05 and json.loads(record.read_text())["fit"] is None
    other = tmp_path / "other.json"
    other.write_text('{"suite": "step"}')
    with pytest.raises(ValueError, match=r"other.json is no record of `python -m bench kmeans`"):
        kmeans_plot.draw(other)


def test_wrong_ids_are_not_timed() -> None:
    x, centroids = kmeans.clip_like(SMALL, 8, 16)
    with pytest.raises(RuntimeError, match=r"row \d+ has id 3, the float64 argmin is"):
        kmeans.check(x, centroids, torch.full((200,), 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_reason_is_given() -> None:
    with pytest.raises(ValueError, match="no CUDA device; --device cpu"):
        kmeans.run(kmeans.KMeansBenchmark())
