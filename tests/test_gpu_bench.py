"""The attention suite on a GPU: every way that is there runs and is right, and ours keeps no tensor of size N^2."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("mapet.config")  # whose packages a machine with torch alone may lack

from bench import attention, timing
from bench.contest import Rules, measure
from mapet_kernels.registry import TwoStreamShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = TwoStreamShape(97, 41, batch=4, heads=3, size=64)


@pytest.fixture(scope="module")
def ways() -> dict[str, dict[str, Any]]:
    """What a contest over one small shape records."""
    device = torch.device("cuda")
    rules = Rules(device, timing.clock_for(device), 3, 1.0, timing.Deadline(float("inf")))
    return measure(attention.contest("target", SHAPE, "bf16", device), rules)["ways"]


def test_every_way_is_timed_or_not_there(ways: dict[str, dict[str, Any]]) -> None:
    """In particular FlexAttention with every setting, whose gradients only a GPU can check."""
    assert not {name: row["reason"] for name, row in ways.items() if row["status"] in ("failed", "wrong")}
    timed = {name for name, row in ways.items() if row["status"] == "timed"}
    flex = {"flex_one_call_128", "flex_two_calls_128"}
    assert timed >= {"ours_sdpa", "sdpa_mask", "official", "official_with_masks", *flex}


def test_ours_keeps_the_log_sum_exp_only(ways: dict[str, dict[str, Any]]) -> None:
    """Besides inputs and outputs, for the backward pass: 4 bytes a row and head."""
    row = ways["ours_triton"]
    if row["status"] == "unavailable":
        pytest.skip(row["reason"])
    rows = SHAPE.tokens + 2 * SHAPE.targets
    statistics = 4 * SHAPE.batch * SHAPE.heads * rows
    scores = 2 * SHAPE.batch * SHAPE.heads * rows * SHAPE.tokens
    assert statistics <= row["saved_bytes"] <= statistics + 2048  # the allocator rounds up
    assert row["memory"]["extra_bytes"] < scores
