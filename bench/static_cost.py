"""What a kernel costs at least on a GPU that is not here: from its machine code and the tiles that it goes through.

A floor is the time that one unit of the GPU would need if it never waited. The largest is the one that binds; measured
times are above all of them. Floors are of a kernel with its tiles, not of the GPU as such: other tiles have others.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.sass import Code, Loop


@dataclass(frozen=True)
class Gpu:
    """Rates by clock are of one processor (SM), others of the whole GPU. Sizes in bytes."""

    name: str
    processors: int
    clock: float  # Hz, under load
    tensor_flop: int  # dense 16-bit, by clock
    exp2: int  # by clock
    schedulers: int  # each issues one instruction of a warp by clock
    l2: float  # bytes/s between L2 and the processors
    hbm: float  # bytes/s, of a copy
    registers: int = 65536
    shared: int = 228 * 1024
    reserved: int = 1024  # shared memory that every program needs besides its own
    warps: int = 64
    programs: int = 32


H200 = Gpu("H200", 132, 1.75e9, tensor_flop=4096, exp2=16, schedulers=4, l2=7.0e12, hbm=4.3e12)
"""The L2 rate is the upper end of what is measured on Hopper, 5.5 to 7 TB/s; under load the tensor cores reach 790 of
their 946 TFLOP/s."""


def resident_programs(registers: int, shared: int, warps: int, gpu: Gpu = H200) -> int:
    """Programs that a processor holds at a time, given the registers of a thread, shared memory and warps of one.

    Registers are given to a warp in units of 256 from its scheduler's share, shared memory in units of 128 bytes.
    """
    by_warp = -(-registers * 32 // 256) * 256
    by_registers = gpu.registers // gpu.schedulers // by_warp * gpu.schedulers // warps
    by_shared = gpu.shared // (-(-shared // 128) * 128 + gpu.reserved)
    return min(by_registers, by_shared, gpu.warps // warps, gpu.programs)


@dataclass(frozen=True)
class Work:
    """What a launch does, all its programs together.

    Attributes:
        visible: pairs of a row and a key (k-means: centroid) that the result needs.
        executed: pairs in the tiles that are computed.
        flop: of the tensor cores for a pair.
        exp2: exponentials for a pair.
        trips: how often each kind of loop is gone through, by its name in the record.
        branches: how often each branch of the loop over tiles is taken, in the order of the source.
        trip_flop: of the tensor cores in one trip of the loop with the products, as the source has it.
        l2: bytes that programs load and store.
        hbm: bytes of all operands and results, each once.
    """

    visible: int
    executed: int
    flop: int
    exp2: int
    trips: dict[str, int]
    branches: tuple[int, ...]
    trip_flop: int
    l2: int
    hbm: int


def floors(work: Work, instructions: int, gpu: Gpu = H200) -> dict[str, float]:
    """Microseconds by unit, given the instructions that all warps execute together."""
    clocks = gpu.processors * gpu.clock
    seconds = {
        "tensor cores": work.executed * work.flop / (gpu.tensor_flop * clocks),
        "exp2": work.executed * work.exp2 / (gpu.exp2 * clocks),
        "issue slots": instructions / (gpu.schedulers * clocks),
        "L2": work.l2 / gpu.l2,
        "HBM": work.hbm / gpu.hbm,
    }
    return {name: round(1e6 * value, 2) for name, value in seconds.items()}


def executed(code: Code, loops: dict[str, Loop], work: Work, programs: int, warps: int) -> int:
    """Instructions that all warps execute together: once what is in no loop, and the named loops as often as given.

    Loops without a name are those that may be left out: not one trip of them is counted. The branches of the loop over
    tiles are taken as often as the work says; where the compiler made other branches of them, all cost the same.
    """
    total = programs * len(code.outside)
    for name, loop in loops.items():
        total += work.trips[name] * (len(loop.own) - sum(loop.branches))
    branches, taken = loops["tile"].branches, work.branches
    if len(branches) != len(taken):
        taken = tuple(count for count in taken if count)  # there is no code for a mask that is never applied
    if len(branches) == len(taken):
        total += sum(size * count for size, count in zip(branches, taken, strict=True))
    else:
        total += sum(branches) * sum(taken) // len(taken) if taken else 0
    return warps * total


def product_loops(code: Code) -> dict[str, Loop]:
    """Of a kernel that goes over tiles: "tile"; and, where a tile takes many products, "product", the loop inside.

    Raises:
        ValueError: not one loop uses the tensor cores, or several.
    """
    products = [loop for loop in code.loops if loop.tensor]
    if len(products) != 1:
        raise ValueError(f"expected one loop with tensor-core instructions, found {len(products)}")
    around = [loop for loop in code.loops if loop.places > products[0].places]
    if not around:
        return {"tile": products[0]}
    return {"product": products[0], "tile": max(around, key=lambda x: len(x.places))}
