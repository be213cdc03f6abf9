"""bench/static_cost.py: floors and programs a processor against numbers worked out by hand."""

from __future__ import annotations

import pytest
from test_sass import listing

from bench import static_cost
from bench.sass import Code
from bench.static_cost import H200, Work

PAIRS = 22 * 128 * 64 * 3072


def work(**options) -> Work:
    values = {
        "visible": 297_145_344, "executed": PAIRS, "flop": 256, "exp2": 1, "trips": {"tile": 22}, "branches": (),
        "trip_flop": 2 * 128 * 64 * 128, "l2": 1_400_000_000, "hbm": 662_000_000,
    }  # fmt: skip
    return Work(**values | options)


def test_floors() -> None:
    """553,648,128 pairs, 16 a clock on 132 processors of 1.75 GHz, by exp2 and, at 4096 FLOP a clock, by products."""
    floors = static_cost.floors(work(), instructions=924_000_000 * 1_000 // 4_000)
    assert floors == {"tensor cores": 149.8, "exp2": 149.8, "issue slots": 250.0, "L2": 200.0, "HBM": 153.95}


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [
        (128, 48 * 1024, 8, 2),  # 16 warps by registers
        (205, 64 * 1024, 8, 1),  # 208 registers a thread: 2 warps a scheduler
        (168, 48 * 1024, 4, 3),  # 5376 registers a warp: 3 of a scheduler's 16384
        (32, 49408, 8, 4),  # 228 KiB by 48.25 + 1
        (255, 192 * 1024, 8, 1),
        (32, 0, 4, 16),  # 64 warps
        (16, 0, 1, 32),
        (64, 227 * 1024, 4, 1),
    ],
)
def test_programs_a_processor(registers: int, shared: int, warps: int, programs: int) -> None:
    assert static_cost.resident_programs(registers, shared, warps) == programs


LOOP = listing(
    "MOV R0, R1",
    ".L_x_0:",
    "@P0 BRA `(.L_x_1)",
    "FSEL R2, R2, -INF, P1",
    ".L_x_1:",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], R24",
    "@P2 BRA `(.L_x_0)",
    "EXIT",
)


def test_executed_instructions() -> None:
    """2 outside for each of 5 programs, 3 in each of 22 tiles, 1 for each of 7 masks; by 8 warps."""
    code = Code(LOOP)
    loops = static_cost.product_loops(code)
    assert static_cost.executed(code, loops, work(branches=(7,)), 5, 8) == 8 * (2 * 5 + 3 * 22 + 7)
    # The compiler merged two masks into one branch: it costs what both cost.
    assert static_cost.executed(code, loops, work(branches=(3, 5)), 5, 8) == 8 * (2 * 5 + 3 * 22 + 4)
    # Without mask tokens no key stands before a window, so that there is one mask, and code for one.
    assert static_cost.executed(code, loops, work(branches=(0, 5)), 5, 8) == 8 * (2 * 5 + 3 * 22 + 5)
    assert loops["tile"].flop(warps=8) == 2 * 128 * 64 * 16


def test_loops_that_are_not_understood() -> None:
    with pytest.raises(ValueError, match="one loop with tensor-core instructions, found 0"):
        static_cost.product_loops(Code(listing("EXIT")))


def test_the_rates_are_those_of_the_data_sheet() -> None:
    """Dense 16-bit: 989 TFLOP/s at 1.83 GHz."""
    assert H200.tensor_flop * H200.processors * 1.83e9 == pytest.approx(989e12, rel=0.001)


def test_the_shapes_are_described() -> None:
    pytest.importorskip("triton")
    from bench.aot_cases import CASES

    target = "two-stream attention, plain: B x H = 256 x 12 = 3072, N = 197, c = 50, D = 64, bf16"
    narrow = "k-means, exact: 65536 rows, 8192 clusters, 64 features, bf16"
    assert [CASES[name].described for name in ("target", "kmeans_narrow")] == [target, narrow]
