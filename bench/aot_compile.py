"""Compile a Triton launch for a GPU that is not here, and read what the assembler reports.

Every launch goes through the code that launches on a GPU: same configuration table, arguments and specialisation.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from mapet_kernels.launch import Target
from mapet_kernels.triton_launch import Launch

TYPE_NAMES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int8: "i8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg")
"""The compiler options among a launch's constants."""

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
SERIALIZED = re.compile(r"C75\d\d\b.*wgmma|wgmma.*serialized")
"""The assembler's way to say that tensor-core instructions wait for each other: C7515 and its relatives."""


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture.

    Attributes:
        variant, size, dtype: of what it was compiled for: attention's variant or k-means' mode, head size or features.
        rows, keys: of a tile, where the kernel has tiles of both.
        spill_stores, spill_loads, shared: in bytes.
        mma: tensor-core instructions in PTX.
        asynchronous_copies: instructions in PTX that begin one.
        warnings: what the assembler finds worth saying.
    """

    kernel: str
    variant: str
    size: int
    dtype: str
    architecture: int
    rows: int | None
    keys: int | None
    warps: int
    stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    mma: int
    asynchronous_copies: int
    warnings: tuple[str, ...]

    def problems(self) -> list[str]:
        """What makes a kernel with 16-bit operands an error."""
        if self.dtype not in ("fp16", "bf16"):
            return []
        where = f"{self.kernel} {self.variant} {self.size} {self.dtype} sm_{self.architecture}"
        found = [f"{where}: {line}" for line in self.warnings if SERIALIZED.search(line)]
        if self.spill_stores + self.spill_loads:
            found.append(f"{where}: spills {self.spill_stores} + {self.spill_loads} bytes")
        return found


def compile_launch(part: Launch, size: int, dtype: str, variant: str, target: Target) -> tuple[Compiled, bytes]:
    """Compile one launch; what ptxas reports, and the machine code (cubin)."""
    options = {name: part.constants[name] for name in OPTIONS if name in part.constants}
    compiled = triton.compile(source(part), target=GPUTarget("cuda", target.architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    report = ptxas_report(ptx, target.architecture)
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups())
    return Compiled(
        kernel=part.kernel.__name__,
        variant=variant,
        size=size,
        dtype=dtype,
        architecture=target.architecture,
        rows=part.constants.get("BM"),
        keys=part.constants.get("BN"),
        warps=compiled.metadata.num_warps,
        stages=compiled.metadata.num_stages,
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spill_stores=stores,
        spill_loads=loads,
        shared=compiled.metadata.shared,
        mma=len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", ptx)),
        asynchronous_copies=len(re.findall(r"\bcp\.async\.(?:bulk\.tensor|cg|ca)", ptx)),
        warnings=assembler_warnings(report),
    ), compiled.asm["cubin"]


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
            signature[name] = f"tensordesc<{TYPE_NAMES[value.base.dtype]}[{block}]>"
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        signature[name] = f"*{TYPE_NAMES[value.dtype]}" if isinstance(value, Tensor) else "i32"
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


def assembler_warnings(report: str) -> tuple[str, ...]:
    """Lines of `ptxas -v` that warn, or inform of a loss of performance, which have a number in brackets."""
    lines = (line.removeprefix("ptxas").strip() for line in report.splitlines() if line.startswith("ptxas"))
    return tuple(line for line in lines if not line.startswith("info") or re.search(r"\(C\d+\)", line))
