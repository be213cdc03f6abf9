"""The tile counts of bench/tile_count.py beside the kernels in Triton's interpreter; run by test_tile_count.py."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from op_checks import set_tiles

from bench import aot_cases
from bench.aot_cases import TWO_STREAM_VARIANTS, Attention
from mapet_kernels import launch
from mapet_kernels.two_stream_attention import kernel

STEPS = {"softmax_step": 3, "query_gradient_step": 1, "key_gradient_step": 2}
"""What every kernel calls once a tile, and how many of the first arguments it gives back."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many tiles the kernels take, and masks they apply: "before" and "after"."""
    counts: Counter[str] = Counter()

    def step(accumulators: int):
        def count(*arguments):
            counts["tiles"] += 1
            return arguments[0] if accumulators == 1 else arguments[:accumulators]

        return count

    for name, accumulators in STEPS.items():
        monkeypatch.setattr(kernel, name, step(accumulators))

    def mask_scores(b_s, key, first, last, m_before, m_after):
        counts["before"] += bool(m_before)
        counts["after"] += bool(m_after)
        return b_s

    monkeypatch.setattr(kernel, "mask_scores", mask_scores)
    return counts


def put_values(monkeypatch: pytest.MonkeyPatch, case: Attention) -> None:
    """The tensors of a case's launches, without values elsewhere, are zeros, its cut, and orders to read."""
    values = {
        (case.batch,): torch.full((case.batch,), case.cut),
        (case.batch, case.tokens): torch.arange(case.tokens).repeat(case.batch, 1),
    }

    def full(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return values[shape].clone() if dtype == torch.int64 else torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(aot_cases, "_empty", full)


def check(monkeypatch: pytest.MonkeyPatch, counted: Counter[str], case: Attention) -> None:
    put_values(monkeypatch, case)
    sets = case.batch * case.heads
    for part in case.launches(launch.OLDEST):
        counted.clear()
        part.run(torch.device("cpu"))
        expected = case.tiles(part)
        found = (part.programs, counted["tiles"], counted["before"], counted["after"])
        assert found == tuple(sets * n for n in (expected.programs, expected.tiles, *expected.masks)), (part, case)


@pytest.mark.parametrize("variant", TWO_STREAM_VARIANTS)
@pytest.mark.parametrize(("tokens", "cut"), [(19, 6), (33, 0)])
def test_counts_are_those_of_the_kernels(monkeypatch, counted, variant: str, tokens: int, cut: int) -> None:
    set_tiles(monkeypatch, *(((16, 16), (16, 32), (32, 16)) if cut else ((32, 32), (32, 16), (16, 32))))
    check(monkeypatch, counted, Attention(2, 1, tokens, cut, size=16, dtype="fp32", variant=variant))


def test_counts_at_the_target(monkeypatch, counted) -> None:
    """The tokens of the target."""
    set_tiles(monkeypatch, (64, 64), (128, 64), (32, 128))
    check(monkeypatch, counted, Attention(1, 1, size=16, dtype="fp16"))
