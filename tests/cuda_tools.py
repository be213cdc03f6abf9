"""CUDA compilers found on this machine, and what they say about a kernel: registers, spills, instructions."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
SHARED_LIMITS = {70: 96 << 10, 75: 64 << 10, 80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory a block may ask for, by architecture (CUDA C++ Programming Guide, compute capabilities)."""

ASSIGN_KERNELS = [
    f"mapet::scores_kernel<__half, {exact}, {ahead}>" for exact in ("true", "false") for ahead in ("true", "false")
]
"""Kernels of kmeans_assign by their C++ names."""
KERNELS = {
    "forward": "MAPET_CALL(ForwardCall)",
    "query_gradient": "MAPET_CALL(QueryGradientCall)",
    "key_gradient": "KeyGradientCall",
}
"""Kernels of two-stream attention, with their parameter."""


@dataclass(frozen=True)
class Resources:
    """What ptxas reports for one kernel."""

    kernel: str
    registers: int
    spilled: int
    """Bytes, stores and loads."""


def kernel_names(element: str, sizes: tuple[int, ...]) -> list[str]:
    """C++ names of the three kernels for padded head sizes."""
    return [f"mapet::{kernel}_kernel<{element}, {size}>" for kernel in KERNELS for size in sizes]


def instantiations(element: str, sizes: tuple[int, ...]) -> str:
    """A source file that holds all of them and nothing else."""
    lines = [
        f"template __global__ void {kernel}_kernel<{element}, {size}>({parameter});"
        for kernel, parameter in KERNELS.items()
        for size in sizes
    ]
    return "\n".join(['#include "two_stream_attention.cuh"', "namespace mapet {", *lines, "}", ""])


def parse_resources(log: str) -> list[Resources]:
    """Kernels in the output of ptxas -v."""
    found = []
    for entry in re.split(r"(?=Compiling entry function)", log)[1:]:
        name = re.search(r"Compiling entry function '(\w+)'", entry)[1]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        found.append(Resources(name, int(registers[1]), int(spills[1]) + int(spills[2])))
    return found


def has_nvcc() -> bool:
    """Whether nvcc is on PATH."""
    return shutil.which("nvcc") is not None


def entry_names(ptx: str) -> list[str]:
    """Kernels in PTX, as they are called there."""
    return re.findall(r"\.entry (\w+)\(", ptx)


def nvcc_cubin(source: Path, architecture: int, cubin: Path) -> list[Resources]:
    """Compile for one architecture."""
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    options = ["-cubin", "-O3", "-std=c++17", f"-I{CSRC}", "-gencode", target, "-Xptxas", "-v"]
    done = subprocess.run(
        ["nvcc", *options, str(source), "-o", str(cubin)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return parse_resources(done.stderr)


def cuobjdump() -> str | None:
    """The disassembler on PATH, or Triton's own."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    inside = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else Path("absent")
    return str(inside) if inside.is_file() else None


WANTED = re.compile(r"\b(HMMA\.\d+|LDGSTS|(?:LDG|STG)\.E\.128)\b")


def instructions(cubin: Path) -> dict[str, Counter[str]]:
    """How often each `WANTED` stands in each function of a cubin: HMMA.16816 multiplies 16 x 16 by 16 x 8."""
    text = subprocess.run([cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)", text)[1:]
    return {name: Counter(WANTED.findall(body)) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def nvidia_folder(*parts: str) -> Path | None:
    """A folder of the packages nvidia-*-cu12, which need not be installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations) if spec else []
    return next((path for root in roots if (path := Path(root, *parts)).exists()), None)


def runtime_headers() -> list[Path]:
    """Folders that hold cuda_runtime.h and what it includes, of a toolkit or of packages; empty where there is none."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.insert(0, Path(nvcc).resolve().parent.parent)
    for home in homes:
        if home and (folder := Path(home, "include")).joinpath("cuda_runtime.h").is_file():
            return [folder]
    packages = [nvidia_folder("cuda_runtime", "include"), nvidia_folder("cuda_nvcc", "include")]
    return [] if None in packages else packages


@dataclass(frozen=True)
class Nvrtc12:
    """CUDA 12's run-time compiler, the last that knows sm_70, from PyPI packages."""

    library: ctypes.CDLL
    includes: tuple[Path, ...]

    def compile(self, names: list[str], target: str, header: str = "two_stream_attention.cuh") -> tuple[str, str]:
        """(log, PTX) of kernels by their C++ names; for a target sm_XX the log has what ptxas says."""
        program = ctypes.c_void_p()
        source = f'#include "{header}"\n'.encode()
        self._check(self.library.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None))
        for name in names:
            self._check(self.library.nvrtcAddNameExpression(program, name.encode()))
        options = [f"--gpu-architecture={target}", "--std=c++17", "-default-device", "--ptxas-options=-v"]
        options += [f"--include-path={folder}" for folder in self.includes]
        values = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = self.library.nvrtcCompileProgram(program, len(options), values)
        log = self._text(program, "ProgramLog").decode()
        assert status == 0, log[-4000:]
        ptx = self._text(program, "PTX").decode()
        self._check(self.library.nvrtcDestroyProgram(ctypes.byref(program)))
        return log, ptx

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, buffer))
        return buffer.value

    @staticmethod
    def _check(status: int) -> None:
        assert status == 0, f"NVRTC status {status}"


def nvrtc_12() -> Nvrtc12:
    """The compiler; a test that needs it is skipped by the packages that are missing."""
    needed = {
        "nvidia-cuda-nvrtc-cu12": ("cuda_nvrtc", "lib", "libnvrtc.so.12"),
        "nvidia-cuda-runtime-cu12": ("cuda_runtime", "include", "cuda_fp16.h"),
        "nvidia-cuda-nvcc-cu12": ("cuda_nvcc", "include", "crt", "mma.h"),
    }
    found = {package: nvidia_folder(*parts) for package, parts in needed.items()}
    if missing := [package for package, path in found.items() if path is None]:
        pytest.skip(f"needs the CUDA 12 compiler: pip install {' '.join(missing)}")
    library, runtime, crt = found.values()
    return Nvrtc12(ctypes.CDLL(str(library)), (CSRC, runtime.parent, crt.parent.parent))
