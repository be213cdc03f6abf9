"""The attention suite on a GPU: every way that is there runs and is right, and ours keeps no tensor of size N^2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")  # a run ends with a picture

from bench import attention
from bench.attention import AttentionBenchmark, Configuration
from mapet_kernels.registry import TwoStreamShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = TwoStreamShape(97, 41, batch=4, heads=3, size=64)


@pytest.fixture(scope="module")
def configurations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What a run over one small shape records, by label."""
    folder: Path = tmp_path_factory.mktemp("attention")
    options = AttentionBenchmark(device="cuda", repeats=3, output=folder)
    with pytest.MonkeyPatch.context() as patch:
        chosen = [Configuration("target", SHAPE, "bf16", "all"), Configuration("order", SHAPE, "bf16", "order")]
        patch.setattr(attention, "plan", lambda _: chosen)
        path = attention.run(replace(options, preset="quick"))
    assert path.with_suffix(".png").is_file()
    return {c["label"]: c for c in json.loads(path.read_text())["configurations"]}


def test_every_way_is_timed_or_not_there(configurations: dict[str, dict]) -> None:
    """In particular FlexAttention with every setting, whose gradients only a GPU can check."""
    for configuration in configurations.values():
        bad = {n: row["reason"] for n, row in configuration["ways"].items() if row["status"] in ("failed", "wrong")}
        assert not bad
    timed = {name for name, row in configurations["target"]["ways"].items() if row["status"] == "timed"}
    flex = {f"flex_{calls}_{block}" for calls in ("one_call", "two_calls") for block in (64, 128)}
    assert timed >= {"ours_sdpa", "sdpa_mask", "official", "official_with_masks", *flex}


def test_ours_keeps_the_log_sum_exp_only(configurations: dict[str, dict]) -> None:
    """Besides inputs and outputs, for the backward pass: 4 bytes a row and head."""
    row = configurations["target"]["ways"]["ours_triton"]
    if row["status"] == "unavailable":
        pytest.skip(row["reason"])
    rows = SHAPE.tokens + 2 * SHAPE.targets
    statistics = 4 * SHAPE.batch * SHAPE.heads * rows
    scores = 2 * SHAPE.batch * SHAPE.heads * rows * SHAPE.tokens
    assert statistics <= row["memory"]["saved_bytes"] <= statistics + 2048  # the allocator rounds up
    assert row["memory"]["forward_peak_bytes"] < scores
