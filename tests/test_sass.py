"""bench/sass.py: stored listings of real kernels with counts made by hand, and small ones for each kind of branch."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from bench.sass import Code

DATA = Path(__file__).parent / "data"


def stored(name: str) -> Code:
    return Code(gzip.decompress((DATA / f"{name}_sm90.sass.gz").read_bytes()).decode())


def listing(text: str) -> str:
    """Instructions, here with ";" between them, and labels as the disassembler writes them."""
    lines = [line.strip() for line in re.split(r";|(?<=:) ", text)]
    return "\n".join(x if x.endswith(":") else f"        /*{16 * n:04x}*/      {x} ;" for n, x in enumerate(lines) if x)


def test_forward_kernel() -> None:
    """Two loops: with a mask from 0x17d0 to 0x3540, without from 0x3a40 to 0x4df0, the end of the kernel at 0x6b10."""
    code = stored("forward_kernel_triton3.6")
    masked, plain = code.loops
    assert len(masked.own) == (0x3540 - 0x17D0) // 16 + 1 == 472
    assert len(plain.own) == (0x4DF0 - 0x3A40) // 16 + 1 == 316
    assert len(code.outside) == 0x6B10 // 16 + 1 - 472 - 316 == 926
    assert (min(masked.places), min(plain.places)) == (0x17D0 // 16, 0x3A40 // 16)
    for loop in code.loops:
        assert (loop.tensor, loop.groups, loop.waits, loop.in_flight, loop.branches) == (8, 2, (0,), 0, ())
        assert loop.count("LDGSTS") == 4
        # A tile is 128 x 64 with two products over 64: 2 * 2 * 128 * 64 * 64.
        assert loop.flop(warps=8) == 2 * 2 * 128 * 64 * 64
    assert code.peeled == 0


def test_nested_loops_with_bulk_copies() -> None:
    """The score kernel of k-means: products inside tiles, from 0x1aa0 to 0x2010; a loop over hits beside them."""
    code = stored("scores_kernel_triton3.8")
    tile, product, hits = code.loops
    assert product.places < tile.places and hits.places < tile.places
    assert product.tensor == 8 and product.groups == 2 and tile.tensor == hits.tensor == 0
    assert product.flop(warps=8) == 2 * 256 * 128 * 64
    assert product.in_flight == 4  # six copies begin before the loop, a trip waits for two
    assert len(tile.places) == len(tile.own) + len(product.places) + len(hits.places)


def test_the_wait_at_the_head_says_what_is_in_flight() -> None:
    def loop(wait: str):
        code = Code(listing(f"NOP; .L_x_0: DEPBAR.LE SB0, {wait}; LDGDEPBAR; LDGDEPBAR; @P0 BRA `(.L_x_0); EXIT"))
        return code.loops[0]

    assert [(loop(w).in_flight, loop(w).groups, loop(w).waits) for w in ("0x0", "0x2")] == [(0, 2, (0,)), (2, 2, (2,))]
    bare = Code(listing(".L_x_0: DEPBAR.LE SB0, 0x2; @P0 BRA `(.L_x_0); EXIT")).loops[0]
    assert bare.in_flight == 0  # it waits, but copies nothing


def test_branches_that_mask() -> None:
    """The run that is left out selects values; a jump out of line that comes back to it leaves nothing out."""
    code = Code(
        listing(
            ".L_x_0: @P0 BRA `(.L_x_1); ISETP.GE.AND P1, PT, R0, R1, PT; FSEL R2, R2, -INF, P1; .L_x_1: "
            "@!P3 BRA `(.L_x_2); .L_x_3: FSEL R2, R2, R3, P1; @P2 BRA `(.L_x_0); EXIT; .L_x_2: "
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR4], RZ; @!P3 BRA `(.L_x_2); BRA `(.L_x_3)"
        )
    )
    assert len(code.loops) == 1  # trying again whether a barrier was passed is no loop of its own
    assert code.loops[0].branches == (2,)
    assert len(code.loops[0].own) == 9 and len(code.outside) == 1


def test_what_cannot_be_reached_is_not_counted() -> None:
    trap = Code(listing("MOV R0, R1; @P0 EXIT; BRA.DIV UR4, `(.L_x_1); EXIT; .L_x_0: BRA `(.L_x_0); NOP; .L_x_1: NOP"))
    assert (len(trap.outside), trap.loops) == (4, ())


def test_a_loop_whose_head_is_not_its_first_instruction() -> None:
    """Entered in the middle: the head is where it is entered, and what stands above belongs to it."""
    code = Code(listing("BRA `(.L_x_1); .L_x_0: FADD R0, R0, R1; .L_x_1: @P0 BRA `(.L_x_0); EXIT"))
    (loop,) = code.loops
    assert [x.name for x in loop.own] == ["BRA", "FADD"]


def test_convergence_and_calls() -> None:
    """BSYNC goes on where its BSSY says; what is called ends at its return and is in no loop."""
    code = Code(
        listing(
            ".L_x_0: BSSY B0, `(.L_x_1); @P0 BSYNC B0; CALL.REL.NOINC `(slow); BSYNC B0; .L_x_1: "
            "@P1 BRA `(.L_x_0); EXIT; slow: FADD R0, R0, R1; RET.REL.NODEC R2 `(kernel)"
        )
    )
    assert [len(loop.own) for loop in code.loops] == [5]
    assert [x.name for x in code.outside] == ["EXIT", "FADD", "RET"]


@pytest.mark.parametrize(("text", "message"), [("", "no instruction"), (listing("BRX R2 -0x10"), "register points")])
def test_listings_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Code(text).loops  # noqa: B018
