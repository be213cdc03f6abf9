"""The Triton kernels in Triton's interpreter: triton_*cases.py in their own process, as kernels are made at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mapet_kernels.backends import choose_backend

NAMES = ("prefix_", "embed_", "model_", "kmeans_")
CASES = [(f"triton_{name}cases.py", "") for name in NAMES]
# In two processes, as it takes the longest.
CASES += [("triton_cases.py", "random or budget"), ("triton_cases.py", "not (random or budget)")]
FOLDER = Path(__file__).parent

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("cases", "chosen"), CASES)
def test_kernels_in_the_interpreter(cases: str, chosen: str) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(FOLDER / cases)]
    command += ["-k", chosen] if chosen else []
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER.parent, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_asking_for_triton_where_it_cannot_run_says_why() -> None:
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .*(needs a CUDA device, not cpu|not installed)"):
        choose_backend("triton", "cpu", among=("triton",))
