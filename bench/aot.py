"""python -m bench aot: compile the Triton kernels for GPUs that are not here, and tell what they cost at least.

For every kernel at named shapes: what the assembler says, what the loops look like in machine code, and the time below
which an H200 cannot go with today's tiles; other tiles have other floors. Needs torch, triton and numpy only. Another
Triton than the installed one, such as the one `make test` installs, comes first on the path:
PYTHONPATH=.venv/triton36 python -m bench aot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import triton

from bench import records, static_cost
from bench.aot_cases import CASES, DTYPES, PREFIX_SUFFIX_VARIANTS, TWO_STREAM_VARIANTS, Attention, KMeans
from bench.aot_compile import Compiled, compile_launch
from bench.sass import Code, disassemble
from mapet_kernels import launch
from mapet_kernels.launch import Target
from mapet_kernels.triton_launch import Launch

BATCH = 2
"""Images of the matrix, where no time follows from their number."""


@dataclass(frozen=True)
class AotReport:
    """What to compile.

    Attributes:
        shapes: names of `bench.aot_cases.CASES`.
        matrix: compile every combination of the options below instead, and report resources alone.
        variants: of attention, see `bench.aot_cases.Attention`.
        features: of k-means.
        record: whether to keep the result.
        output: folder for the record.
    """

    shapes: tuple[str, ...] = tuple(CASES)
    matrix: bool = False
    sizes: tuple[int, ...] = (16, 32, 64, 80, 128)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    architectures: tuple[int, ...] = (80, 90)
    variants: tuple[str, ...] = (*TWO_STREAM_VARIANTS, *PREFIX_SUFFIX_VARIANTS)
    features: tuple[int, ...] = (64, 512, 4096)
    record: bool = True
    output: Path = records.RESULTS


@dataclass(frozen=True)
class Cost:
    """One kernel at a named shape on sm_90: what was compiled, and what follows for an H200.

    Attributes:
        shape: its name.
        programs: of the launch.
        resident: programs that one processor holds at a time (CTAs an SM).
        hgmma: whether its products use the tensor cores of Hopper.
        outside: instructions in no loop.
        loops: by name ("tile"; of k-means also "product"); a trip begins `copies`, and at its head `copies_in_flight`
            are on their way.
        visible, executed: pairs of a row and a key, of all images and heads.
        tensor_visible: microseconds that the tensor cores need for the visible pairs.
        floors: microseconds by unit, see `static_cost.floors`; empty for kernels without tiles.
        binding: the largest.
        notes: what stands in the way of these figures, or changes them.
    """

    shape: str
    compiled: Compiled
    programs: int
    resident: int
    hgmma: bool
    outside: int
    loops: dict[str, dict[str, Any]] = field(default_factory=dict)
    visible: int | None = None
    executed: int | None = None
    tensor_visible: float | None = None
    floors: dict[str, float] = field(default_factory=dict)
    binding: str | None = None
    notes: tuple[str, ...] = ()


def run(options: AotReport) -> list[str]:
    """Compile, print tables, keep a record if wanted, and return what is wrong with the kernels, a line each."""
    results, problems = of_matrix(options) if options.matrix else of_shapes(options)
    for line in problems:
        print(f"ERROR {line}")
    if options.record:
        label = f"{'matrix' if options.matrix else 'static'}_triton{triton.__version__}"
        path = records.write("aot", label, results | {"problems": problems}, options.output)
        print(f"record: {path}")
    return problems


def of_shapes(options: AotReport) -> tuple[dict[str, Any], list[str]]:
    """The record's results for the named shapes, and what is wrong."""
    if unknown := set(options.shapes) - set(CASES):
        raise ValueError(f"unknown shapes {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    costs = [cost for name in options.shapes for cost in costs_of(name)]
    print(f"triton {triton.__version__}, sm_90; floors in us for an {static_cost.H200.name}, of these tiles alone")
    cells = [tuple(COLUMNS), *(tuple(column(cost) for column in COLUMNS.values()) for cost in costs)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)).rstrip())
    print(LEGEND, *(f"{name}: {CASES[name].described}" for name in options.shapes), sep="\n")
    for cost in costs:
        for line in (*cost.compiled.warnings, *cost.notes):
            print(f"{cost.shape} {cost.compiled.kernel}: {line}")
    results = {
        "triton": triton.__version__,
        "gpu": asdict(static_cost.H200),
        "shapes": {name: asdict(CASES[name]) for name in options.shapes},
        "kernels": [asdict(cost) for cost in costs],
    }
    return results, [problem for cost in costs for problem in cost.compiled.problems()]


def costs_of(name: str, target: Target = launch.TARGETS[90], products: bool = False) -> Iterator[Cost]:
    """The cost of every kernel at a named shape, or only of those with products of matrices."""
    case = CASES[name]
    for part in case.launches(target):
        if not products or case.work(part) is not None:
            yield cost_of(name, case, part, target)


def cost_of(name: str, case: Attention | KMeans, part: Launch, target: Target) -> Cost:
    """Compile one launch, take its machine code apart, and work out its floors."""
    compiled, cubin = compile_launch(part, case.size, case.dtype, case.variant, target)
    resident = static_cost.resident_programs(compiled.registers, compiled.shared, compiled.warps)
    code, work = Code(disassemble(cubin)), case.work(part)
    hgmma = any(x.name == "HGMMA" for x in code.instructions)
    common = (name, compiled, part.programs, resident, hgmma, len(code.outside))
    if work is None:
        return Cost(*common)
    notes = (f"{code.peeled} tensor-core instructions in no loop",) if code.peeled else ()
    try:
        loops = static_cost.product_loops(code)
    except ValueError as error:  # the compiler made something else of the loops: the rest still counts
        return Cost(*common, notes=(*notes, str(error)))
    notes += tuple(
        f"one trip of the {name} loop does {times:.3g} of the source"
        for name, loop in loops.items()
        if loop.tensor and (times := loop.flop(compiled.warps) / work.trip_flop) != 1
    )
    floors = static_cost.floors(work, static_cost.executed(code, loops, work, part.programs, compiled.warps))
    return Cost(
        *common,
        loops={
            name: {
                "instructions": len(loop.own) - sum(loop.branches), "branches": list(loop.branches),
                "tensor": loop.tensor, "copies": loop.groups, "copies_in_flight": loop.in_flight,
                "waits": list(loop.waits), "trips": work.trips[name],
            }
            for name, loop in loops.items()
        },
        visible=work.visible,
        executed=work.executed,
        tensor_visible=round(floors["tensor cores"] * work.visible / work.executed, 2),
        floors=floors,
        binding=max(floors, key=floors.__getitem__),
        notes=notes,
    )  # fmt: skip


def of_loops(text: Callable[[dict[str, Any]], str]) -> Callable[[Cost], str]:
    """A column on each loop."""
    return lambda cost: " / ".join(text(loop) for loop in cost.loops.values())


COLUMNS: dict[str, Callable[[Cost], str]] = {
    "shape": lambda cost: cost.shape,
    "kernel": lambda cost: cost.compiled.kernel.removesuffix("_kernel"),
    "tile": lambda cost: f"{cost.compiled.rows}x{cost.compiled.keys}" if cost.compiled.rows else "",
    "warps, stages": lambda cost: f"{cost.compiled.warps}, {cost.compiled.stages}",
    "registers": lambda cost: str(cost.compiled.registers),
    "spills": lambda cost: f"{cost.compiled.spill_stores}/{cost.compiled.spill_loads}",
    "shared KiB": lambda cost: f"{cost.compiled.shared / 1024:.1f}",
    "CTAs/SM": lambda cost: str(cost.resident),
    "HGMMA": lambda cost: "yes" if cost.hgmma else "no",
    "in flight": of_loops(lambda loop: f"{loop['copies_in_flight']} of {loop['copies']}"),
    "instructions": of_loops(lambda loop: " + ".join(map(str, [loop["instructions"], *loop["branches"]]))),
    "outside": lambda cost: str(cost.outside),
    "useful": lambda cost: f"{cost.visible / cost.executed:.0%}" if cost.executed else "",
    **{
        unit: lambda cost, unit=unit: f"{cost.floors[unit]:.0f}" if cost.floors else ""
        for unit in ("tensor cores", "exp2", "issue slots", "L2", "HBM")
    },
    "binding": lambda cost: cost.binding or "",
}
LEGEND = """
spills: bytes of registers stored / loaded. in flight: copies under way at the head of a loop, of those a trip begins.
instructions: of a trip without masks, + of each mask; / between the loop over features and that over tiles. outside:
instructions in no loop, once a program. useful: visible pairs of those computed. Then the floors by unit.
"""


def of_matrix(options: AotReport) -> tuple[dict[str, Any], list[str]]:
    """The record's results for the matrix, printed as they come, and what is wrong."""
    compiled = []
    for x in compile_all(options):
        compiled.append(x)
        print(", ".join(f"{name} {value}" for name, value in asdict(x).items() if value not in (None, ())), flush=True)
    results = {"triton": triton.__version__, "kernels": [asdict(x) for x in compiled]}
    return results, [problem for x in compiled for problem in x.problems()]


def compile_all(options: AotReport) -> Iterator[Compiled]:
    """Compile the kernels for each combination of the matrix."""
    cases: list[Attention | KMeans] = [
        Attention(batch=BATCH, size=size, dtype=dtype, variant=variant)
        for size, dtype, variant in product(options.sizes, options.dtypes, options.variants)
    ]
    cases += [
        KMeans(features=features, dtype=dtype, exact=exact)
        for features, dtype, exact in product(options.features, options.dtypes, (True, False))
        if dtype != "tf32"
    ]
    for case, architecture in product(cases, options.architectures):
        target = launch.TARGETS[architecture]
        for part in case.launches(target):
            yield compile_launch(part, case.size, case.dtype, case.variant, target)[0]


def launches(size: int, dtype: str, variant: str, target: Target) -> list[Launch]:
    """The launches of one forward and backward pass of attention at MaPeT's size."""
    return Attention(batch=BATCH, size=size, dtype=dtype, variant=variant).launches(target)
