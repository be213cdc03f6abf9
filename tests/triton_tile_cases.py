"""The tile counts of bench/tile_count.py beside the kernels in Triton's interpreter; run by test_tile_count.py."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from triton_checks import set_tiles

from bench import aot_cases
from bench.aot_cases import PREFIX_SUFFIX_VARIANTS, TWO_STREAM_VARIANTS, Attention
from mapet_kernels import launch, visibility
from mapet_kernels.prefix_suffix_attention import kernel as prefix_suffix
from mapet_kernels.two_stream_attention import kernel as two_stream

STEPS = {
    two_stream: {"_forward_step": 3, "_query_gradient_step": 1, "_key_gradient_step": 2},
    prefix_suffix: {"softmax_step": 3, "query_gradient_step": 1, "_take_rows": 2},
}
"""What a kernel calls once a tile, with MASKED among its arguments, and how many of the first ones it gives back."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step that the kernels take has a mask; the steps themselves are left out."""
    taken: list[bool] = []

    def counting(step: Any, accumulators: int):
        place = step.arg_names.index("MASKED")

        def count(*arguments):
            taken.append(bool(arguments[place]))
            return arguments[0] if accumulators == 1 else arguments[:accumulators]

        return count

    for module, steps in STEPS.items():
        for name, accumulators in steps.items():
            monkeypatch.setattr(module, name, counting(getattr(module, name), accumulators))
    return taken


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


def check(monkeypatch: pytest.MonkeyPatch, steps: list[bool], case: Attention) -> None:
    put_values(monkeypatch, case)
    sets = case.batch * case.heads
    for part in case.launches(launch.OLDEST):
        steps.clear()
        part.run(torch.device("cpu"))
        if part.kernel.__name__ == "row_tile_list_kernel":
            continue
        counted = case.tiles(part)
        expected = Counter({True: counted.masked * sets, False: counted.plain * sets})
        assert Counter(steps) == +expected, (part.kernel.__name__, case)
        assert part.programs == counted.programs * sets, (part.kernel.__name__, case)


@pytest.mark.parametrize("variant", [*TWO_STREAM_VARIANTS, *PREFIX_SUFFIX_VARIANTS])
@pytest.mark.parametrize(("tokens", "cut"), [(2, 0), (19, 6), (33, 0), (40, 39)])
def test_counts_are_those_of_the_kernels(monkeypatch, steps, variant: str, tokens: int, cut: int) -> None:
    for tiles in (((16, 16), (16, 32), (32, 16)), ((32, 32), (32, 16), (16, 32))):
        set_tiles(monkeypatch, *tiles)
        check(monkeypatch, steps, Attention(2, 1, tokens, cut, size=16, dtype="fp32", variant=variant))


@pytest.mark.parametrize("variant", ["plain", "pim", "single"])
def test_counts_at_the_target(monkeypatch, steps, variant: str) -> None:
    """The tokens of the target, with the tiles of the launch table of Hopper and with smaller ones."""
    case = Attention(1, 1, size=16, dtype="fp16", variant=variant)
    for tiles in (((128, 64), (128, 64), (32, 128)), ((64, 64), (64, 64), (32, 64))):
        set_tiles(monkeypatch, *tiles)
        check(monkeypatch, steps, case)
