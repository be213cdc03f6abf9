"""The Triton kernels in Triton's interpreter, in processes of their own, as kernels are made at import.

test_ops.py, test_kmeans.py and test_cuda_embed.py run for them what they run for every backend; triton_*cases.py more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mapet_kernels.backends import INTERPRETED, choose_backend

FOLDER = Path(__file__).parent
JOBS = {
    "attention, budget": ("test_ops.py", "-k", "triton and budget and two_stream"),
    "ops": (
        *("test_ops.py", "-k"),
        "compiles and attention or triton and (budget and not two_stream or strided and attention)",
    ),
    "attention, random": ("triton_cases.py", "-k", "random or rules or long"),
    "attention": ("triton_cases.py", "-k", "not (random or rules or long)"),
    "kmeans": ("test_kmeans.py", "triton_kmeans_cases.py", "-k", "interpreted or triton_kmeans_cases"),
    "embed, tiles, golden": ("test_cuda_embed.py", "triton_tile_cases.py", "triton_model_cases.py", "-k", "not losses"),
    "losses": ("triton_model_cases.py", "-k", "losses"),
}
LONG = {"attention, random", "losses"}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is such a process")
@pytest.mark.parametrize("job", [pytest.param(job, marks=pytest.mark.long) if job in LONG else job for job in JOBS])
def test_kernels_in_the_interpreter(job: str) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *JOBS[job]]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_asking_for_triton_where_it_cannot_run_says_why() -> None:
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .*(needs a CUDA device, not cpu|not installed)"):
        choose_backend("triton", "cpu", among=("triton",))
