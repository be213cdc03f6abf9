"""python -m bench aot: compile the Triton kernels for GPUs that are not here, and tell what they cost at least.

For every kernel at named shapes: what the assembler says, what the loops look like in machine code, and the time below
which an H200 cannot go with today's tiles; other tiles have other floors. Needs torch, triton and numpy only.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton

from bench import records, static_cost
from bench.aot_cases import CASES, DTYPES, PREFIX_SUFFIX_VARIANTS, TWO_STREAM_VARIANTS, Attention, KMeans
from bench.aot_compile import Compiled, compile_launch, compile_with_code
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
        triton: a version that `make test` installs beside the installed one, such as 3.6, or a folder with another
            Triton (pip install --no-deps --target FOLDER triton==3.6.0), to be taken in place of the installed one.
        matrix: compile every combination of the options below instead, and report resources alone.
        variants: of attention, see `bench.aot_cases.Attention`.
        features: of k-means.
        record: whether to keep the result.
        output: folder for the record.
    """

    shapes: tuple[str, ...] = tuple(CASES)
    triton: str | None = None
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
        loops: by name ("tile"; of k-means also "product"), see `static_cost.loop_record`.
        masks: how often each branch of the loop over tiles is taken, which applies a mask.
        outside: instructions in no loop.
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
    loops: dict[str, dict[str, Any]] = field(default_factory=dict)
    outside: int | None = None
    masks: tuple[int, ...] = ()
    visible: int | None = None
    executed: int | None = None
    tensor_visible: float | None = None
    floors: dict[str, float] = field(default_factory=dict)
    binding: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def useful(self) -> float | None:
        """Visible pairs by executed ones."""
        return self.visible / self.executed if self.executed else None


def run(options: AotReport) -> list[str]:
    """Compile, print tables, keep a record if wanted, and return what is wrong with the kernels, a line each."""
    if options.triton is not None and not is_loaded(folder := overlay(options.triton)):
        return run_with(folder, options)
    results, problems = of_matrix(options) if options.matrix else of_shapes(options)
    for line in problems:
        print(f"ERROR {line}")
    if options.record:
        label = f"{'matrix' if options.matrix else 'static'}_triton{triton.__version__}"
        path = records.write("aot", label, results | {"problems": problems}, options.output)
        print(f"record: {path}")
    return problems


def overlay(name: str) -> Path:
    """The folder that `AotReport.triton` names."""
    version = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)?", name)
    return Path(sys.prefix, f"triton{version[1]}{version[2]}") if version else Path(name)


def is_loaded(folder: Path) -> bool:
    """Whether the Triton in use is the one in `folder`."""
    return Path(triton.__file__).resolve().is_relative_to(folder.resolve())


def run_with(folder: Path, options: AotReport) -> list[str]:
    """`run` in a process that has `folder` first on its path.

    Raises:
        ValueError: there is no Triton in that folder, or the process fails.
    """
    if not (folder / "triton/__init__.py").exists():
        raise ValueError(f"no Triton in {folder}: pip install --no-deps --target {folder} triton==VERSION")
    # sys.argv is passed on, so that the record holds the command that was given.
    command = [sys.executable, "-c", "from bench import aot; aot.run_as_child()", *sys.argv[1:]]
    result = subprocess.run(
        command,
        input=json.dumps(asdict(options) | {"triton": os.fspath(folder)}, default=os.fspath),
        stdout=subprocess.PIPE,
        text=True,
        env=environment_with(folder),
        check=False,
    )
    *shown, last = result.stdout.splitlines() or [""]
    print("\n".join(shown))
    if result.returncode or not last.startswith("["):
        raise ValueError(f"compiling with the Triton in {folder} failed (exit status {result.returncode})")
    return json.loads(last)


def environment_with(folder: Path) -> dict[str, str]:
    """Environment of a Python that finds `folder` first, and what this one finds."""
    path = os.pathsep.join(
        [os.fspath(folder.resolve()), os.fspath(records.RESULTS.parent.parent), *filter(None, sys.path)]
    )
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": path}


def run_as_child() -> None:
    """What `run_with` starts: options as JSON on stdin; the last line on stdout is the list of problems."""
    given = json.load(sys.stdin)
    print(json.dumps(run(AotReport(**given | {"output": Path(given["output"])}))))


def of_shapes(options: AotReport) -> tuple[dict[str, Any], list[str]]:
    """The record's results for the named shapes, and what is wrong."""
    if unknown := set(options.shapes) - set(CASES):
        raise ValueError(f"unknown shapes {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    costs = [cost for name in options.shapes for cost in costs_of(name)]
    print(table(costs))
    for line in (*legend(), *described(options.shapes), *backward_passes(costs), *remarks(costs)):
        print(line)
    results = {
        "triton": triton.__version__,
        "gpu": asdict(static_cost.H200),
        "shapes": {name: asdict(CASES[name]) for name in options.shapes},
        "kernels": [asdict(cost) for cost in costs],
        "backward_in_one_pass": {
            name: case.one_pass() for name in options.shapes if isinstance(case := CASES[name], Attention)
        },
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
    compiled, cubin = compile_with_code(part, case.size, case.dtype, case.variant, target)
    resident = static_cost.resident_programs(compiled.registers, compiled.shared, compiled.warps)
    code, work = Code(disassemble(cubin)), case.work(part)
    hgmma = any(x.name == "HGMMA" for x in code.instructions)
    common = (name, compiled, part.programs, resident, hgmma)
    if work is None:
        return Cost(*common, outside=len(code.outside))
    notes = (f"{code.peeled} tensor-core instructions in no loop",) if code.peeled else ()
    try:
        loops = case.loops(code)
    except ValueError as error:  # the compiler made something else of the loops: the rest still counts
        return Cost(*common, outside=len(code.outside), notes=(*notes, str(error)))
    notes += tuple(
        f"one trip of the {name} loop does {times:.3g} of the source"
        for name, loop in loops.items()
        if loop.tensor and (times := static_cost.unrolled(loop, compiled.warps, work.trip_flop)) != 1
    )
    instructions = static_cost.executed(code, loops, work, part.programs, compiled.warps)
    floors = static_cost.floors(work, instructions)
    return Cost(
        *common,
        loops={name: static_cost.loop_record(loop, work.trips[name]) for name, loop in loops.items()},
        outside=len(code.outside),
        masks=work.branches,
        visible=work.visible,
        executed=work.executed,
        tensor_visible=static_cost.tensor_floor(work.visible, work.flop),
        floors=floors,
        binding=static_cost.binding(floors),
        notes=notes,
    )


COLUMNS = (
    "shape", "kernel", "tile", "warps", "stages", "registers", "shared KiB", "CTAs/SM", "spills", "HGMMA", "in flight",
    "instructions", "outside", "trips a program", "masks a program", "useful", "tensor (visible)", "exp2", "issue",
    "L2", "HBM", "binding",
)  # fmt: skip


LEGEND = {
    "CTAs/SM": "programs that one processor holds at a time, by registers, shared memory and warps",
    "spills": "bytes of registers stored to memory / loaded from it",
    "in flight": "X of Y: X copies are under way at the head of a loop, one trip begins Y; / between two loops",
    "instructions": "tile 331 + 66 + 66: of a trip of the loop over tiles without masks, + of the mask for what comes "
    "before a window, + of that for what comes after (or of one for both); product: of the loop inside, over features",
    "outside": "instructions in no loop, once a program",
    "trips a program": "of each loop, on average",
    "masks a program": "how often each mask is applied, on average, in the order of the instructions",
    "useful": "pairs of a row and a key that are visible, of those in the tiles that are computed",
    "tensor (visible)": "us of the tensor cores for the computed tiles (for the visible pairs alone)",
    "exp2, issue, L2, HBM": "us of the exponentials, of issuing instructions, of moving bytes from and to L2 and HBM",
    "binding": "the largest of these floors, which hold for the tiles in this table: other tiles have others",
    "in one pass": "us of a single backward kernel of five products that computes visible pairs alone, in place of two",
}
"""Of the columns that need words, and of the lines on backward passes."""


def legend() -> list[str]:
    """Lines under the table."""
    return ["", *(f"{column}: {words}" for column, words in LEGEND.items()), ""]


def described(names: Sequence[str]) -> list[str]:
    """A line a named shape, saying what it is."""
    return [*(f"{name}: {CASES[name].described}" for name in names), ""]


def table(costs: Sequence[Cost]) -> str:
    """A line a kernel; floors in microseconds."""
    lines = [COLUMNS, *(row_of(cost) for cost in costs)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    head = f"triton {triton.__version__}, sm_90; floors in us for an {static_cost.H200.name}"
    padded = ("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join([head, *(line.rstrip() for line in padded)])


def row_of(cost: Cost) -> tuple[str, ...]:
    """One line of the table. Several loops are separated by slashes, in the order of their names."""
    x, loops, floors = cost.compiled, cost.loops.values(), cost.floors
    tensor = f"{floors['tensor cores']:.0f} ({cost.tensor_visible:.0f})" if floors else ""
    return (
        cost.shape,
        x.kernel.removesuffix("_kernel"),
        f"{x.rows}x{x.keys}" if x.rows else "",
        str(x.warps),
        str(x.stages),
        str(x.registers),
        f"{x.shared / 1024:.1f}",
        str(cost.resident),
        f"{x.spill_stores}/{x.spill_loads}",
        "yes" if cost.hgmma else "no",
        " / ".join(f"{loop['copies_in_flight']} of {loop['copies']}" for loop in loops),
        " / ".join(instructions_of(name, loop) for name, loop in cost.loops.items()),
        str(cost.outside),
        " / ".join(f"{loop['trips'] / cost.programs:.1f}" for loop in loops),
        " + ".join(f"{count / cost.programs:.1f}" for count in cost.masks),
        f"{cost.useful:.0%}" if cost.useful else "",
        tensor,
        *(f"{floors[name]:.0f}" if floors else "" for name in ("exp2", "issue slots", "L2", "HBM")),
        cost.binding or "",
    )


def instructions_of(name: str, loop: dict[str, Any]) -> str:
    """Instructions of each trip, and those of its branches."""
    return " + ".join([f"{name} {loop['instructions']}", *map(str, loop["branches"])])


def remarks(costs: Sequence[Cost]) -> list[str]:
    """What the assembler says, and notes, by kernel."""
    return [f"{x.shape} {x.compiled.kernel}: {line}" for x in costs for line in (*x.compiled.warnings, *x.notes)]


def backward_passes(costs: Sequence[Cost]) -> list[str]:
    """By shape: the issue slots of the backward kernels together, and the floors of a single kernel in their place."""
    lines = []
    for name in dict.fromkeys(x.shape for x in costs):
        issue = [
            x.floors["issue slots"] for x in costs if x.shape == name and "gradient" in x.compiled.kernel and x.floors
        ]
        if issue:
            once = ", ".join(f"{unit} {value:.0f}" for unit, value in CASES[name].one_pass().items())
            parts = " + ".join(f"{value:.0f}" for value in issue)
            lines.append(f"{name}: backward, issue {parts} = {sum(issue):.0f}; in one pass: {once}")
    return lines


def of_matrix(options: AotReport) -> tuple[dict[str, Any], list[str]]:
    """The record's results for the matrix, printed as they come, and what is wrong."""
    compiled = []
    for x in compile_all(options):
        compiled.append(x)
        tile = f"{x.rows} x {x.keys}" if x.rows else "-"
        print(
            f"{x.kernel:22} {x.variant:16} D {x.size:4} {x.dtype} sm_{x.architecture} tile {tile:9} warps {x.warps} "
            f"stages {x.stages} registers {x.registers:3} spills {x.spill_stores:4}/{x.spill_loads:4} "
            f"shared {x.shared / 1024:5.1f} KiB mma {x.mma:3} async {x.asynchronous_copies:3}",
            *x.warnings,
            flush=True,
        )
    results = {"triton": triton.__version__, "kernels": [asdict(x) for x in compiled]}
    return results, [problem for x in compiled for problem in x.problems()]


def compile_all(options: AotReport) -> Iterator[Compiled]:
    """Compile the kernels for each combination of the matrix."""
    cases: list[Attention | KMeans] = [
        Attention(batch=BATCH, size=size, dtype=dtype, variant=variant)
        for size in options.sizes
        for dtype in options.dtypes
        for variant in options.variants
    ]
    cases += [
        KMeans(features=features, dtype=dtype, exact=exact)
        for features in options.features
        for dtype in options.dtypes
        if dtype != "tf32"
        for exact in (True, False)
    ]
    for case in cases:
        for architecture in options.architectures:
            target = launch.TARGETS[architecture]
            for part in case.launches(target):
                yield compile_launch(part, case.size, case.dtype, case.variant, target)


def launches(size: int, dtype: str, variant: str, target: Target) -> list[Launch]:
    """The launches of one forward and backward pass of attention at MaPeT's size."""
    return Attention(batch=BATCH, size=size, dtype=dtype, variant=variant).launches(target)
