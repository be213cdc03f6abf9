"""Package layout: folder kernels/ is installed as mapet_kernels, mapet/ as mapet. The rest is in pyproject.toml.

With MAPET_BUILD_CUDA=1 the CUDA C++ kernels in csrc/ are built as mapet_kernels._C, for the architectures in
TORCH_CUDA_ARCH_LIST ("7.0;8.0"), or all that nvcc knows of those the kernels are for. Without it all is pure Python.
"""

import os
import re
import shutil
import subprocess
import sys

from setuptools import find_packages, setup

ARCHITECTURES = (70, 75, 80, 90, 100, 120)
"""Code for one runs on all GPUs of the same major version that are as new or newer."""


def nvcc_architectures(nvcc: str) -> set[int]:
    """Architectures that this nvcc compiles for."""
    text = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return {int(number) for number in re.findall(r"compute_(\d+)", text)}


def toolkit(nvcc: str) -> str | None:
    """The toolkit's folder, wherever this nvcc, a link or a script maybe, stands itself; None for unknown."""
    said = subprocess.run([nvcc, "--dryrun", "-c", "any.cu"], capture_output=True, text=True, check=False).stderr
    found = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return found and os.path.realpath(found[1])


def cuda_extensions() -> dict:
    """Arguments of setup() that build mapet_kernels._C; ends with what is missing where that cannot be."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("MAPET_BUILD_CUDA=1 needs nvcc on PATH (CUDA toolkit); without the variable no compiler is needed")
    if not {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys() and (home := toolkit(nvcc)):
        os.environ["CUDA_HOME"] = home  # what torch guesses from PATH has no headers where nvcc is a script
    try:
        from torch.utils.cpp_extension import BuildExtension, CUDAExtension
    except ImportError as error:
        sys.exit(
            f"MAPET_BUILD_CUDA=1 needs torch at build time ({error}). pip builds in an environment without it unless "
            "told otherwise: MAPET_BUILD_CUDA=1 pip install --no-build-isolation --no-deps ."
        )
    known = nvcc_architectures(nvcc)
    default = ";".join(f"{a // 10}.{a % 10}" for a in ARCHITECTURES if a in known)
    wanted = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default)
    for major, minor in re.findall(r"(\d+)\.(\d)", wanted):
        if int(major + minor) not in known:
            sys.exit(
                f"TORCH_CUDA_ARCH_LIST asks for {major}.{minor}, which {nvcc} does not know; it knows "
                f"{', '.join(f'{a // 10}.{a % 10}' for a in sorted(known))}. CUDA 12 is the last with 7.0 (V100)."
            )
    extension = CUDAExtension(
        "mapet_kernels._C",
        ["csrc/bindings.cpp", "csrc/two_stream_attention.cu", "csrc/permuted_embed.cu", "csrc/kmeans_assign.cu"],
        extra_compile_args={"cxx": ["-O2"], "nvcc": ["-O3"]},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(
    packages=[
        "mapet_kernels",
        *(f"mapet_kernels.{name}" for name in find_packages("kernels")),
        *find_packages(include=["mapet", "mapet.*"]),
    ],
    package_dir={"mapet_kernels": "kernels"},
    **(cuda_extensions() if os.environ.get("MAPET_BUILD_CUDA") == "1" else {}),
)
