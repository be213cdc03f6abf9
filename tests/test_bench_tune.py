"""Other tiles without a GPU: candidates, the table with another entry, kernels that run alone in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench import tune
from bench.harvesting.kernels import neighbours
from bench.tune import Entry
from mapet_kernels import launch
from mapet_kernels.launch import LaunchConfig

A100, H100 = launch.TARGETS[80], launch.TARGETS[90]
ENTRY = Entry("attention_forward", "fp16", 64, H100)


def test_candidates_hold_what_the_table_holds_and_fit_by_size() -> None:
    for kernel, dtype, size, target in product(tune.KERNELS, ("fp16", "bf16"), (16, 64, 128), launch.TARGETS.values()):
        entry = Entry(kernel, dtype, size, target)
        found = list(tune.candidates(entry))
        assert entry.present() in found and len(found) == len(set(found)) <= 72
    wide = replace(ENTRY, size=128, dtype="fp32", target=A100)
    assert not tune.can_work(LaunchConfig(128, 128, 4, 1), replace(ENTRY, kernel="attention_key_gradient", size=128))
    assert [tune.can_work(LaunchConfig(32, 128, 8, stages), wide) for stages in (3, 1)] == [False, True]


def test_neighbours_are_one_step_away() -> None:
    found = neighbours(LaunchConfig(64, 32, 4, 1))
    assert found == [LaunchConfig(64, 32, 4, 2), LaunchConfig(64, 32, 8, 1)]


def test_an_override_ends_with_its_block() -> None:
    other = LaunchConfig(16, 32, 4, 1)
    with pytest.raises(KeyError), tune.override("attention_forward", other):
        assert launch.attention_forward(64, torch.float16, H100) == other
        raise KeyError
    assert launch.attention_forward(64, torch.float16, H100) == ENTRY.present()


def test_results_must_agree() -> None:
    expected = torch.tensor([1.0, -100.0], dtype=torch.float16)
    for error, agrees in ((0.5, True), (2.0, False), (float("nan"), False)):
        assert tune.close(expected + torch.tensor([error, 0.0]).half(), expected) is agrees


INTERPRETED = """
import torch
from bench import tune
from mapet_kernels import launch
from mapet_kernels.launch import LaunchConfig
from mapet_kernels.registry import TwoStreamShape

shape, device = TwoStreamShape(13, 4, 1, 1, 16), torch.device("cpu")
old, other = LaunchConfig(32, 32, 4, 1), LaunchConfig(64, 64, 4, 1)
for kernel in tune.KERNELS:
    runner = tune.Runner(tune.Entry(kernel, "fp16", 16, launch.TARGETS[80]), shape, device)
    assert runner.agrees(other, old), kernel
    runner.results = tuple(x.clone() for x in runner.results)
    assert not runner.agrees(other, old), "nothing was written, so NaN is left"
print("three kernels")
"""


def test_kernels_of_an_entry_run_alone() -> None:
    """Each kernel launched by itself with other tiles, in the interpreter, gives the same results."""
    environment, root = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, Path(__file__).parent.parent
    command = [sys.executable, "-c", INTERPRETED]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert result.returncode == 0 and "three kernels" in result.stdout, result.stderr[-3000:]
