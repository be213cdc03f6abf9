"""python -m bench aot: compile the Triton kernels for GPUs that are not here, and tell what the compiler made of them.

Every launch goes through the code that launches on a GPU: same configuration table, arguments and specialisation.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from mapet_kernels import launch
from mapet_kernels.prefix_suffix_attention import problem as prefix_suffix_problem
from mapet_kernels.prefix_suffix_attention import triton_backend as prefix_suffix
from mapet_kernels.triton_launch import Launch
from mapet_kernels.two_stream_attention import triton_backend as two_stream
from mapet_kernels.two_stream_attention.problem import Problem, Streams

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
"""By name; "tf32" is fp32 whose products are rounded to TF32."""

TYPE_NAMES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
"""The compiler options among a launch's constants."""

TWO_STREAM_VARIANTS = ("plain", "gather", "last_block", "pim")
PREFIX_SUFFIX_VARIANTS = ("single", "single_per_image")
BATCH, HEADS, TOKENS, TARGETS = 2, 12, 197, 147
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


@dataclass(frozen=True)
class AotReport:
    """What to compile: every combination of these.

    Attributes:
        variants: of two-stream attention "plain"; "gather" (image order and one cut per image); "last_block" (query
            stream only); "pim". Of prefix-suffix attention "single"; "single_per_image" (shifts and cut of each image).
        record: whether to keep the result in bench/results/.
    """

    sizes: tuple[int, ...] = (16, 32, 64, 80, 128)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    architectures: tuple[int, ...] = (80, 90)
    variants: tuple[str, ...] = (*TWO_STREAM_VARIANTS, *PREFIX_SUFFIX_VARIANTS)
    record: bool = True


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture. Spills and shared memory in bytes; `mma` counts tensor-core instructions."""

    kernel: str
    variant: str
    size: int
    dtype: str
    architecture: int
    rows: int
    keys: int
    warps: int
    stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    mma: int


def run(options: AotReport) -> dict[str, Any]:
    """Compile all, print a table line each, and return the record's results."""
    rows = []
    for row in compile_all(options):
        rows.append(asdict(row))
        print(
            f"{row.kernel:22} {row.variant:16} D {row.size:3} {row.dtype} sm_{row.architecture} tiles {row.rows:3} x "
            f"{row.keys:3} warps {row.warps} stages {row.stages} registers {row.registers:3} "
            f"spills {row.spill_stores:4}/{row.spill_loads:4} shared {row.shared / 1024:5.1f} KiB mma {row.mma:3}",
            flush=True,
        )
    return {"triton": triton.__version__, "tokens": TOKENS, "targets": TARGETS, "kernels": rows}


def compile_all(options: AotReport) -> Iterator[Compiled]:
    """Compile the forward and all backward kernels for each combination."""
    for size in options.sizes:
        for dtype in options.dtypes:
            for variant in options.variants:
                for architecture in options.architectures:
                    target = launch.TARGETS[architecture]
                    for part in launches(size, dtype, variant, target):
                        yield compile_launch(part, size, dtype, variant, target)


def launches(size: int, dtype: str, variant: str, target: launch.Target) -> list[Launch]:
    """The launches of one forward and backward pass at MaPeT's size, on CPU tensors that are never read."""
    of_op = two_stream_launches if variant in TWO_STREAM_VARIANTS else prefix_suffix_launches
    parts = of_op(size, DTYPES[dtype], variant, target)
    if dtype == "tf32":  # what torch's setting on a GPU would ask for
        parts = [replace(part, constants=part.constants | {"PRECISION": "tf32"}) for part in parts]
    return parts


def two_stream_launches(size: int, dtype: torch.dtype, variant: str, target: launch.Target) -> list[Launch]:
    cut = TOKENS - TARGETS
    problem = Problem(TOKENS, TARGETS, cut, variant != "pim", size**-0.5)
    perm = None
    if variant == "gather":
        problem = Problem(TOKENS, TARGETS, torch.full((BATCH,), cut), True, size**-0.5)
        perm = torch.zeros(BATCH, TOKENS, dtype=torch.int64)

    def streams() -> Streams:
        content = None if variant == "last_block" else rows(problem.content_rows, size, dtype)
        return Streams(content, rows(TARGETS, size, dtype))

    q, out, d_out, dq = (streams() for _ in range(4))
    lse = Streams(*(None if x is None else torch.empty(x.shape[:3]) for x in (out.content, out.query)))
    (k, v), (dk, dv) = (key_halves(problem.content_rows, size, dtype) for _ in range(2))
    return [
        two_stream.forward_launch(q, k, v, out, lse, problem, perm, target),
        *two_stream.backward_launches(d_out, q, k, v, out, lse, dq, dk, dv, problem, perm, target),
    ]


def prefix_suffix_launches(size: int, dtype: torch.dtype, variant: str, target: launch.Target) -> list[Launch]:
    shift, cut = torch.zeros(TOKENS, dtype=torch.int64), TOKENS - TARGETS
    if variant == "single_per_image":
        shift, cut = shift.repeat(BATCH, 1), torch.full((BATCH,), cut)
    problem = prefix_suffix_problem.Problem(shift, cut, TARGETS, size**-0.5)
    q, out, d_out, dq = (rows(TOKENS, size, dtype) for _ in range(4))
    k, v = key_halves(TOKENS + TARGETS, size, dtype)
    dk, dv = (rows(TOKENS + TARGETS, size, dtype) for _ in range(2))
    lse = torch.empty(out.shape[:3])
    return [
        prefix_suffix.forward_launch(q, k, v, out, lse, problem, target),
        *prefix_suffix.backward_launches(d_out, q, k, v, out, lse, dq, dk, dv, problem, target),
    ]


def rows(count: int, size: int, dtype: torch.dtype) -> Tensor:
    """(B, count, H, D)."""
    return torch.empty(BATCH, count, HEADS, size, dtype=dtype)


def key_halves(count: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Keys and values as one projection writes them: two (B, count, H, D) in one tensor."""
    return torch.empty(BATCH, count, 2, HEADS, size, dtype=dtype).unbind(2)


def compile_launch(part: Launch, size: int, dtype: str, variant: str, target: launch.Target) -> Compiled:
    """Compile one launch and read what ptxas reports."""
    options = {name: part.constants[name] for name in OPTIONS if name in part.constants}
    compiled = triton.compile(source(part), target=GPUTarget("cuda", target.architecture, 32), options=options)
    report = ptxas_report(compiled.asm["ptx"], target.architecture)
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups())
    return Compiled(
        kernel=part.kernel.__name__,
        variant=variant,
        size=size,
        dtype=dtype,
        architecture=target.architecture,
        rows=part.constants["BM"],
        keys=part.constants["BN"],
        warps=part.constants["num_warps"],
        stages=part.constants["num_stages"],
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spill_stores=stores,
        spill_loads=loads,
        shared=compiled.metadata.shared,
        mma=len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", compiled.asm["ptx"])),
    )


def source(part: Launch) -> ASTSource:
    """The kernel with the types, constants and alignments that launching with these arguments gives it."""
    signature, constants, attributes = {}, {}, {}
    names = [parameter.name for parameter in part.kernel.params]
    values = dict(zip(names, part.arguments, strict=False)) | part.constants
    for index, parameter in enumerate(part.kernel.params):
        name, value = parameter.name, values[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialised):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPE_NAMES[value.base.dtype][1:]}[{block}]>"
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        signature[name] = TYPE_NAMES[value.dtype] if isinstance(value, Tensor) else "i32"
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if specialised and number % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(part.kernel, signature, constants, attributes)


def ptxas_report(ptx: str, architecture: int) -> str:
    """What `ptxas -v` says, with the assembler that comes with Triton."""
    name = f"sm_{architecture}a" if architecture == 90 else f"sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [os.fspath(PTXAS), "-v", f"--gpu-name={name}", str(path), "-o", str(Path(folder, "kernel.cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
