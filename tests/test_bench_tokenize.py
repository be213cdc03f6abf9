"""The benchmark of tokenising runs the real pipeline and accounts for its time."""

import pytest

from bench.tokenize_suite import TokenizeBenchmark, run


def test_it_measures_the_real_pipeline():
    options = TokenizeBenchmark(images=6, batch=4, workers=0, grid=2, vocabulary=8, width=80, height=60)
    results = run(options)
    assert (results["images"], results["precision"], results["input_size"]) == (6, "fp32", 64)
    assert list(results["waited_seconds"]) == ["decode", "network", "assign", "write"]
    assert sum(results["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert results["bottleneck"] in results["waited_seconds"] and results["jpeg"]["mean_bytes"] > 500
    assert results["images_per_second"] == pytest.approx(6 / results["seconds"], rel=0.05)


def test_too_few_images_for_the_codebook():
    with pytest.raises(ValueError, match="2 images have 8 different features, the codebook needs 9"):
        run(TokenizeBenchmark(images=2, workers=0, grid=2, vocabulary=9, width=80, height=60))
