"""csrc/bindings.cpp without a GPU: built for CPU tensors over the emulated kernels, and run.

So its checks, and what it hands to the launchers, are tested and not only compiled. Headers in tests/cuda_stub stand in
for those of CUDA and of torch's CUDA streams.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from cuda_host import COMPILER, ROOT

TESTS = Path(__file__).parent
TORCH = Path(torch.__file__).parent
PYTHON = Path(sysconfig.get_paths()["include"])
REFUSALS = """\
TypeError: images must be Byte or Float, got Int
ValueError: give both mean and std, or neither
TypeError: patches must be contiguous Long, got Int
ValueError: out must be [2, 4, 48], got [2, 3, 48]
ValueError: patches must be (B, R) and image size 8 divisible by the patch size, got 3
ValueError: out must be [22, 6], got [9, 6]
ValueError: need a cut in [1, N - 1] and cut or N content rows of an image, got N 5, cut 2 and 4 rows
TypeError: pos_embed must be contiguous Float, got Half
TypeError: content must be contiguous Float, got Float, not contiguous
TypeError: d_masked must be contiguous Float, got Double
TypeError: rows must be Half, got Float
ValueError: rows must have a last dimension of stride 1, got [1, 10]
ValueError: rows and centroids must be (G n, D) and (G K, D), got [32] and [256, 32]
ValueError: backend 'cuda' cannot assign [10, 32] to [256, 32]: operands must start at multiples of \
16 bytes, and rows too
ValueError: rows must be [10, 16], got [10, 32]
ValueError: backend 'cuda' cannot assign [10, 32] to [200, 32]: centroids must be padded to multiples of 128, \
features to multiples of 32, blocks be fewer than 2^31
ValueError: scale must be [10], got [9]
ValueError: the exact mode, with reach, needs radius, slope and slack
ValueError: bounds must be [4, 3, 10], got [4, 1, 10]
TypeError: ids must be contiguous Int, got Long
ValueError: G and S must be positive, and K whole, got G 3, n 5, S 1 and G K 256
ValueError: bounds must be [8, 3, 10], got [4, 3, 10]
ValueError: N and T must be positive and the cut in [N - T, N - 1], got N 5, T 3 and cut 1
ValueError: N and T must be positive and the cut in [N - T, N - 1], got N 5, T 3 and cut 5
ValueError: backend 'cuda' cannot embed [2, 3, 8, 8]: the kernel could not be launched (error 2)
ValueError: backend 'cuda' cannot assemble [22, 6]: the kernel could not be launched (error 2)
ValueError: backend 'cuda' cannot sum the position gradient of [22, 6]: the kernel could not be launched (error 2)
ValueError: backend 'cuda' cannot assign [10, 32] to [256, 32]: the kernel could not be launched (error 2)
ValueError: backend 'cuda' cannot run on head size 8: the kernel could not be launched (error 2)"""


def run(*command: object, seconds: int = 300) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def build(folder: Path) -> Path:
    """The library of operators for CPU tensors."""
    source = (ROOT / "csrc/bindings.cpp").read_text()
    source = source.replace(".is_cuda()", ".is_cpu()").replace("(mapet_kernels, CUDA,", "(mapet_kernels, CPU,")
    # And a call that has launches fail, as the CUDA runtime numbers its errors.
    source += '\n#include "host_emulation.h"\n'
    source += 'extern "C" void fail_launches(int error) { mapet::emulation::launch_error() = error; }\n'
    (folder / "bindings.cpp").write_text(source)
    torch_headers = TORCH / "include"
    includes = [f"-I{p}" for p in (TESTS / "cuda_stub", ROOT / "csrc", torch_headers, PYTHON)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    run(
        COMPILER,
        "-std=c++20",
        "-O0",
        "-fPIC",
        abi,
        *includes,
        "-c",
        folder / "bindings.cpp",
        "-o",
        folder / "bindings.o",
    )
    objects = [folder / "bindings.o"]
    for kernels in sorted((ROOT / "csrc").glob("*.cu")):
        objects.append(folder / f"{kernels.stem}.o")
        options = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-Wno-unknown-pragmas", abi, "-x", "c++"]
        run(COMPILER, *options, "-c", kernels, "-o", objects[-1])
    library = folder / "operators.so"
    run(COMPILER, "-shared", *objects, f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-o", library)
    return library


def has_float16() -> bool:
    """Whether there is a C++ compiler, with half precision."""
    if COMPILER is None:
        return False
    macros = subprocess.run(
        [COMPILER, "-x", "c++", "-dM", "-E", "-"], input="", capture_output=True, text=True, check=False
    )
    return "__FLT16_MAX__" in macros.stdout


@pytest.mark.long
@pytest.mark.skipif(not has_float16(), reason="needs a C++ compiler with _Float16")
@pytest.mark.skipif(not (PYTHON / "Python.h").is_file(), reason="needs Python.h")
def test_operators_on_cpu_tensors(tmp_path: Path) -> None:
    """Right in every dtype the host has, and readable errors for what does not fit."""
    said = run(sys.executable, TESTS / "cuda_bindings_cases.py", build(tmp_path)).strip()
    for dtype in ("float16", "float32", "float64"):
        assert f"permuted_embed torch.{dtype} is right" in said
    assert "two_stream_attention torch.float16 is right" in said
    for dtype in ("float16", "bfloat16", "float32"):
        assert f"kmeans_assign torch.{dtype} is right" in said
    assert said.endswith(REFUSALS), said
