"""The tile counts of bench/tile_count.py beside the kernels in the interpreter; run by test_triton_interpreter.py."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from op_checks import set_tiles

from bench import aot_cases
from bench.aot_cases import PREFIX_SUFFIX_VARIANTS, TWO_STREAM_VARIANTS, Attention
from mapet_kernels import launch, visibility
from mapet_kernels.prefix_suffix_attention import kernel as prefix_suffix
from mapet_kernels.two_stream_attention import kernel as two_stream

STEPS = {"softmax_step": 3, "query_gradient_step": 1, "key_gradient_step": 2}
"""What every kernel calls once a tile, and how many of the first arguments it gives back."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many tiles the kernels take, and masks they apply: "before" and "after", or "mask" for both in one."""
    counts: Counter[str] = Counter()

    def step(accumulators: int):
        def count(*arguments):
            counts["tiles"] += 1
            return arguments[0] if accumulators == 1 else arguments[:accumulators]

        return count

    for module in (two_stream, prefix_suffix):
        for name, accumulators in STEPS.items():
            monkeypatch.setattr(module, name, step(accumulators))

    def mask_scores(b_s, key, first, last, m_before, m_after):
        counts["before"] += bool(m_before)
        counts["after"] += bool(m_after)
        return b_s

    mask, visible_range = prefix_suffix._mask, prefix_suffix._visible_range

    def count_mask(b_s, *arguments):
        masked = mask(b_s, *arguments)
        counts["mask"] += masked is not b_s
        return masked

    def count_range(*arguments):
        counts["ranges"] += 1  # the kernel of dK and dV reads shifts where it masks, and nowhere else
        return visible_range(*arguments)

    monkeypatch.setattr(two_stream, "mask_scores", mask_scores)
    monkeypatch.setattr(prefix_suffix, "_mask", count_mask)
    monkeypatch.setattr(prefix_suffix, "_visible_range", count_range)
    return counts


def put_values(monkeypatch: pytest.MonkeyPatch, case: Attention) -> None:
    """The tensors of a case's launches, without values elsewhere, are zeros, its cut, and shifts and orders to read."""
    values = {
        (case.batch,): torch.full((case.batch,), case.cut),
        (case.batch, case.tokens): torch.arange(case.tokens).repeat(case.batch, 1),
    }
    shift = visibility.two_stream_shifts(case.tokens, case.cut)[0]
    values |= {(len(shift),): shift, (case.batch, len(shift)): shift.repeat(case.batch, 1)}

    def full(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return values[shape].clone() if dtype == torch.int64 else torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(aot_cases, "_empty", full)


def check(monkeypatch: pytest.MonkeyPatch, counted: Counter[str], case: Attention) -> None:
    put_values(monkeypatch, case)
    sets = case.batch * case.heads
    for part in case.launches(launch.OLDEST):
        counted.clear()
        part.run(torch.device("cpu"))
        name = part.kernel.__name__
        if name == "row_tile_list_kernel":
            continue
        masks = ("before", "after")
        if case.variant in PREFIX_SUFFIX_VARIANTS:
            masks = ("ranges",) if name == "key_gradient_kernel" else ("mask",)
        expected = case.tiles(part)
        found = (part.programs, counted["tiles"], *(counted[mask] for mask in masks))
        assert found == tuple(sets * n for n in (expected.programs, expected.tiles, *expected.masks)), (name, case)


@pytest.mark.parametrize("variant", [*TWO_STREAM_VARIANTS, *PREFIX_SUFFIX_VARIANTS])
@pytest.mark.parametrize(("tokens", "cut"), [(19, 6), (33, 0)])
def test_counts_are_those_of_the_kernels(monkeypatch, counted, variant: str, tokens: int, cut: int) -> None:
    set_tiles(monkeypatch, *(((16, 16), (16, 32), (32, 16)) if cut else ((32, 32), (32, 16), (16, 32))))
    check(monkeypatch, counted, Attention(2, 1, tokens, cut, size=16, dtype="fp32", variant=variant))


@pytest.mark.parametrize("variant", ["plain", "single"])
def test_counts_at_the_target(monkeypatch, counted, variant: str) -> None:
    """The tokens of the target."""
    set_tiles(monkeypatch, (64, 64), (128, 64), (32, 128))
    check(monkeypatch, counted, Attention(1, 1, size=16, dtype="fp16", variant=variant))
