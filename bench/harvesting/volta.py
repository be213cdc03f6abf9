"""The kernels in CUDA C++ as a V100 runs them: built here as PTX for sm_75, the oldest CUDA 13 knows, then the step.

The driver translates PTX, so what is measured is this code on the GPU at hand. fp16, under a cap of 16 GiB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.harvesting.common import ROOT, device_of
from bench.harvesting.part import Run, Skipped

ARCHITECTURE = "7.5+PTX"
STEP = {"model": "base", "batch": 32, "dtype": "fp16", "backend": "cuda", "cap_gib": 16}


def build_command(target: Path, checkout: Path = ROOT) -> list[str]:
    """Install the package with its CUDA kernels into a folder, without a network."""
    return [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
        "--target", str(target), "--upgrade", str(checkout),
    ]  # fmt: skip


def measure(run: Run) -> None:
    """Build, then take the steps in a process that finds the built package first.

    Raises:
        Skipped: there is no nvcc, or this is a dry run.
    """
    device_of(run)
    target = run.folder / "volta"
    if run.dry:
        raise Skipped(f"a dry run builds nothing; a GPU machine would run: {' '.join(build_command(target))}")
    if shutil.which("nvcc") is None:
        raise Skipped("nvcc is not on PATH")
    # pip builds in the folder itself, which may be read-only, and must not be changed.
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "results")
    checkout = shutil.copytree(ROOT, run.folder / "checkout", ignore=left_out)
    environment = os.environ | {"MAPET_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURE, "MAX_JOBS": "8"}
    subprocess.run(build_command(target, checkout), env=environment, check=True)
    path = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", __name__, run.name, str(run.folder), str(max(1.0, run.left()))]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=run.folder, check=True)


if __name__ == "__main__":
    from bench.harvesting import step

    step.measure(Run(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), arguments=STEP))
