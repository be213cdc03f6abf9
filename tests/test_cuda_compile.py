"""The CUDA C++ kernels compiled for GPUs that are not here: no spills, registers within bounds, tensor cores used.

nvcc compiles for sm_75 and sm_90, NVRTC of CUDA 12 for sm_70; a C++ compiler builds and runs csrc/bindings.cpp.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import cuda_tools
import pytest
import torch
from cuda_tools import ASSIGN_KERNELS, Resources
from emulation import COMPILER, CSRC, ROOT, built, compiled, has_half

TESTS = Path(__file__).parent
MOST_REGISTERS = {"two_stream_attention": 255, "permuted_embed": 64, "kmeans_assign": 200}


def embed_kernels(elements: tuple[str, ...]) -> list[str]:
    """C++ names of the embedding's kernels: pixels in bytes and in what is computed in, packs and not."""
    names = []
    for element in elements:
        work, pack = ("double", 2) if element == "double" else ("float", 4 if element == "float" else 8)
        names += [
            f"mapet::permuted_patches_kernel<{pixel}, {element}, {pixels}>"
            for pixel in ("unsigned char", work)
            for pixels in (1, 4)
        ]
        names += [f"mapet::assemble_kernel<{element}, {pixels}>" for pixels in (1, pack)]
        names.append(f"mapet::assemble_position_gradient_kernel<{element}>")
    return names


def check_resources(op: str, resources: list[Resources], kernels: int) -> None:
    assert len(resources) == kernels
    for one in resources:
        assert one.spilled == 0 and one.registers <= MOST_REGISTERS[op], one


def attention_instructions(found: dict[str, Counter[str]], architecture: int) -> None:
    """Copies run ahead of the products from sm_80 on (LDGSTS is cp.async)."""
    wanted = {"HMMA.16816", "LDGSTS"} if architecture >= 80 else {"HMMA.1688"}
    used = [{name for name in counts if ".E." not in name} for counts in found.values()]
    assert used == [wanted] * 6, found


def embed_instructions(found: dict[str, Counter[str]], architecture: int) -> None:
    """Whole packs move in one instruction, and no kernel multiplies matrices."""
    assemble = {name: counts for name, counts in found.items() if "15assemble_kernel" in name}
    packed = [name for name, counts in assemble.items() if counts["LDG.E.128"] and counts["STG.E.128"]]
    assert len(assemble) == 8 and len(packed) == 4 and not any("Li1E" in name for name in packed)
    assert all(counts["STG.E.128"] for name, counts in found.items() if "permuted_patches_kernelIhfLi4" in name)
    assert not any(key.startswith("HMMA") for counts in found.values() for key in counts)


def assign_instructions(found: dict[str, Counter[str]], architecture: int) -> None:
    """Products are the tensor cores', copies run ahead from sm_80 on."""
    product = "HMMA.16816" if architecture >= 80 else "HMMA.1688"
    assert len(found) == len(ASSIGN_KERNELS) and all(counts[product] for counts in found.values()), found
    ahead = [name for name, counts in found.items() if counts["LDGSTS"]]
    assert len(ahead) == (2 if architecture >= 80 else 0) and all("ELb1EEEv" in name for name in ahead)


INSTRUCTIONS = {
    "two_stream_attention": attention_instructions,
    "permuted_embed": embed_instructions,
    "kmeans_assign": assign_instructions,
}


@pytest.mark.skipif(not cuda_tools.has_nvcc(), reason="needs nvcc")
@pytest.mark.parametrize(
    ("op", "kernels", "architecture", "elements"),
    [
        pytest.param("two_stream_attention", 6, 75, "Half", marks=pytest.mark.long),
        pytest.param("two_stream_attention", 6, 90, "Bfloat", marks=pytest.mark.long),
        pytest.param("permuted_embed", 28, 75, None, marks=pytest.mark.long),
        ("permuted_embed", 28, 90, None),
        pytest.param("kmeans_assign", 4, 75, None, marks=pytest.mark.long),
        ("kmeans_assign", 4, 90, None),
    ],
)
def test_nvcc_compiles_without_spills(
    op: str, kernels: int, architecture: int, elements: str | None, tmp_path: Path
) -> None:
    """All kernels that the library holds; of attention head sizes 64 and 128, bf16 on sm_90, where it is most used."""
    source, cubin = CSRC / f"{op}.cu", tmp_path / "kernels.cubin"
    if elements:
        source = tmp_path / "kernels.cu"
        source.write_text(cuda_tools.instantiations(elements, (64, 128)))
    check_resources(op, cuda_tools.nvcc_cubin(source, architecture, cubin), kernels)
    if cuda_tools.cuobjdump() is None:
        pytest.skip("compiled without spills; cuobjdump is not there to look at the instructions")
    INSTRUCTIONS[op](cuda_tools.instructions(cubin), architecture)


@pytest.mark.parametrize(
    ("op", "names"),
    [
        ("two_stream_attention", cuda_tools.kernel_names("__half", (64, 128))),
        pytest.param("two_stream_attention", cuda_tools.kernel_names("__half", (32,)), marks=pytest.mark.long),
        ("permuted_embed", embed_kernels(("__half", "__nv_bfloat16", "float", "double"))),
        ("kmeans_assign", ASSIGN_KERNELS),
    ],
    ids=["attention", "attention of small heads", "embed", "assign"],
)
def test_nvrtc_12_compiles_for_volta_without_spills(op: str, names: list[str]) -> None:
    """V100, sm_70: CUDA 13 cannot compile for it any more. The embedding in bfloat16 too, which needs no hardware."""
    log, ptx = cuda_tools.nvrtc_12().compile(names, "sm_70", header=f"{op}.cuh")
    check_resources(op, cuda_tools.parse_resources(log), len(names))
    assert all("sm_70" in entry for entry in log.split("Compiling entry function")[1:])
    if op != "permuted_embed":
        assert all("wmma.mma.sync.aligned" in body for body in ptx.split(".entry ")[1:])


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


@pytest.mark.long
@pytest.mark.skipif(COMPILER is None or not (PYTHON / "Python.h").is_file(), reason="needs a C++ compiler and Python.h")
def test_bindings_compile_against_this_torch() -> None:
    include_paths = pytest.importorskip("torch.utils.cpp_extension").include_paths  # needs setuptools
    if not (cuda := cuda_tools.runtime_headers()):
        pytest.skip("needs the headers of the CUDA runtime")
    folders = [*include_paths("cpu"), *cuda, PYTHON]
    compiled("-std=c++20", "-fsyntax-only", "-Wall", *(f"-I{folder}" for folder in folders), CSRC / "bindings.cpp")


def build_operators(library: Path) -> None:
    """The operators of csrc/bindings.cpp for CPU tensors over the emulated kernels.

    Headers in tests/cuda_stub stand in for those of CUDA and of torch's CUDA streams.
    """
    source = (CSRC / "bindings.cpp").read_text()
    source = source.replace(".is_cuda()", ".is_cpu()").replace("(mapet_kernels, CUDA,", "(mapet_kernels, CPU,")
    # And a call that has launches fail, as the CUDA runtime numbers its errors.
    source += '\n#include "host_emulation.h"\n'
    source += 'extern "C" void fail_launches(int error) { mapet::emulation::launch_error() = error; }\n'
    parts = [library.with_suffix(".cpp"), *sorted(CSRC.glob("*.cu"))]
    parts[0].write_text(source)
    includes = [f"-I{folder}" for folder in (TESTS / "cuda_stub", CSRC, TORCH / "include", PYTHON)]
    common = ["-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-Wno-unknown-pragmas"]
    emulated = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-x", "c++"]
    objects = [library.with_name(f"{library.name}_{part.stem}.o") for part in parts]
    for part, target in zip(parts, objects, strict=True):
        options = emulated if part.suffix == ".cu" else ["-std=c++20", "-O0", *includes]
        compiled(*common, *options, "-c", part, "-o", target)
    compiled("-shared", *objects, f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-o", library)
    for part in (parts[0], *objects):
        part.unlink()


@pytest.mark.long
@pytest.mark.skipif(not has_half(), reason="needs a C++ compiler with _Float16")
@pytest.mark.skipif(not (PYTHON / "Python.h").is_file(), reason="needs Python.h")
def test_bindings_run_on_cpu_tensors() -> None:
    """Right in every dtype the host has, and readable errors for what does not fit."""
    command = [sys.executable, TESTS / "cuda_bindings_cases.py", built("operators.so", build_operators)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    said = done.stdout.strip()
    right = {"permuted_embed": "float16 float32 float64", "two_stream_attention": "float16"}
    right["kmeans_assign"] = "float16 bfloat16 float32"
    for op, dtypes in right.items():
        assert all(f"{op} torch.{dtype} is right" in said for dtype in dtypes.split())
    assert said.endswith(REFUSALS), said
