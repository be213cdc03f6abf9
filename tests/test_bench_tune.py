"""The tuner without a GPU: its candidates, what it drops, what it chooses and how it says so; kernels interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import tune
from bench.tune import Choice, Entry, Tune
from mapet_kernels import launch
from mapet_kernels.launch import LaunchConfig

A100, H100 = launch.TARGETS[80], launch.TARGETS[90]
ENTRY = Entry("attention_forward", "fp16", 64, H100)
OLD = LaunchConfig(128, 64, 8, 2)
FASTER, SLOWER, UNEVEN = (replace(OLD, stages=s, warps=w) for s, w in ((3, 8), (1, 8), (2, 4)))


def test_candidates_hold_what_the_table_holds_and_fit_by_size() -> None:
    for kernel in tune.KERNELS:
        for dtype in ("fp16", "bf16"):
            for size in (16, 64, 128):
                for target in launch.TARGETS.values():
                    entry = Entry(kernel, dtype, size, target)
                    found = list(tune.candidates(entry))
                    assert entry.present() in found
                    assert len(found) == len(set(found)) <= 72
    assert not tune.can_work(LaunchConfig(128, 128, 4, 1), replace(ENTRY, kernel="attention_key_gradient", size=128))
    assert not tune.can_work(LaunchConfig(32, 128, 8, 3), replace(ENTRY, size=128, dtype="fp32", target=A100))
    assert tune.can_work(LaunchConfig(32, 128, 8, 1), replace(ENTRY, size=128, dtype="fp32", target=A100))


def test_what_spills_or_does_not_fit_is_rejected() -> None:
    assert tune.verdict(0, 163 * 1024, A100) is None
    assert tune.verdict(4, 0, A100) == "spills registers"
    assert tune.verdict(0, 163 * 1024 + 1, A100) == "needs too much shared memory"
    assert tune.verdict(0, 163 * 1024 + 1, H100) is None


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="compiles, which the interpreter does not")
def test_candidates_are_compiled_ahead_of_time() -> None:
    """In a process of their own: the present entry is kept; one that spills, and one that cannot be, are counted."""
    pytest.importorskip("triton")
    entry = Entry("attention_forward", "fp16", 64, A100)
    spilling, impossible = LaunchConfig(128, 64, 4, 2), LaunchConfig(24, 64, 4, 1)
    kept, rejected = tune.compiled(entry, [entry.present(), spilling, impossible], workers=1)
    assert kept == [entry.present()]
    assert rejected.pop("spills registers") == 1
    ((reason, count),) = rejected.items()
    assert reason.startswith("does not compile") and count == 1


def test_an_override_ends_with_its_block() -> None:
    with pytest.raises(KeyError), tune.override("attention_forward", SLOWER):
        assert launch.attention_forward(64, torch.float16, H100) == SLOWER
        raise KeyError
    assert launch.attention_forward(64, torch.float16, H100) == ENTRY.present()


def test_the_choice_is_the_fastest_over_all_shapes() -> None:
    seconds = {
        OLD: {"a": 1.0, "b": 2.0},
        FASTER: {"a": 0.8, "b": 1.6},
        SLOWER: {"a": 1.5, "b": 2.5},
        UNEVEN: {"a": 0.5, "b": 4.4},
    }
    choice = tune.choose(ENTRY, OLD, seconds, {"spills registers": 3})
    assert choice.new == FASTER and choice.gain == pytest.approx(1.25)
    record = choice.as_record()
    assert [c["stages"] for c in record["candidates"]] == [3, 2, 2, 1]
    assert record["candidates"][0]["ms"] == {"a": 800.0, "b": 1600.0}
    assert record["old"]["stages"] == 2 and record["new"]["stages"] == 3 and record["gain"] == 1.25
    assert tune.fastest(seconds, 1, always=SLOWER) == [FASTER, SLOWER]


def test_a_gain_within_the_spread_changes_nothing() -> None:
    choice = tune.choose(ENTRY, OLD, {OLD: {"a": 1.0}, FASTER: {"a": 0.98}}, {})
    assert choice.new == OLD and choice.gain == 1.0
    assert "128 x 64, 8 warps, 2 stages stays" in tune.line(choice)
    assert tune.choose(ENTRY, OLD, {OLD: {"a": 1.0}, FASTER: {"a": 0.96}}, {}).new == FASTER


def test_the_report_is_a_python_literal_of_the_table() -> None:
    choices = [
        Choice(ENTRY, OLD, FASTER, 1.25, {OLD: {"a": 1.0}, FASTER: {"a": 0.8}}, {"spills registers": 3}),
        Choice(replace(ENTRY, dtype="bf16"), OLD, OLD, 1.0, {OLD: {"a": 1.0}}, {}),
    ]
    names = {"LaunchConfig": LaunchConfig}
    exec(tune.table(choices), names)
    assert names["TUNED"] == {
        ("attention_forward", 64, "fp16", 90): FASTER,
        ("attention_forward", 64, "bf16", 90): OLD,
    }
    text = tune.line(choices[0])
    assert "128 x 64, 8 warps, 2 stages -> 128 x 64, 8 warps, 3 stages, 1.25 times as fast" in text
    assert "(2 timed to the end; 3 spills registers)" in text


def test_candidates_are_timed_in_turn_without_their_first_sample() -> None:
    log = []

    class Fake:
        def call(self, config: LaunchConfig):
            samples = iter((9.0, 1.0, 5.0, 3.0))
            return lambda: log.append(config) or next(samples) * config.stages

    class FakeClock:
        def time(self, call):
            return None, call()

    seconds = tune.measured([OLD, FASTER], {"a": Fake()}, FakeClock(), repeats=3)
    assert seconds == {OLD: {"a": 6.0}, FASTER: {"a": 9.0}}
    assert log == [OLD, FASTER] * 4


def test_results_must_agree() -> None:
    expected = torch.tensor([1.0, -100.0], dtype=torch.float16)
    assert tune.close(expected + torch.tensor([0.5, 0.0]).half(), expected)
    assert not tune.close(expected + torch.tensor([2.0, 0.0]).half(), expected)
    assert not tune.close(torch.tensor([float("nan"), -100.0]).half(), expected)


def test_tuning_shapes_have_equally_many_tokens() -> None:
    shapes = tune.tuning_shapes(64, 3072)
    assert [s.tokens for s in shapes.values()] == [197, 50, 785]
    target = shapes["N=197"]
    assert target.cuts == 50 and target.batch * target.heads == 3072
    assert all(abs(s.batch * s.tokens / (256 * 197) - 1) < 0.01 for s in shapes.values())


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device, and torch finds none here"):
            tune.run(Tune(output=tmp_path))
    with pytest.raises(ValueError, match="unknown kernels warp; there are attention_forward"):
        tune.run(Tune(kernels=("warp",)))
    with pytest.raises(ValueError, match="unknown dtypes fp8; there are bf16"):
        tune.run(Tune(dtypes=("fp8",)))
    with pytest.raises(ValueError, match=r"head sizes must be in \[1, 128\], got \[256\]"):
        tune.run(Tune(sizes=(64, 256)))
    assert not list(tmp_path.iterdir())


INTERPRETED = """
import torch
from bench import timing, tune
from mapet_kernels import launch
from mapet_kernels.launch import LaunchConfig
from mapet_kernels.registry import TwoStreamShape

shape, device = TwoStreamShape(13, 4, 1, 1, 16), torch.device("cpu")
old, other = LaunchConfig(32, 32, 4, 1), LaunchConfig(64, 64, 4, 1)
for kernel in tune.KERNELS:
    entry = tune.Entry(kernel, "fp16", 16, launch.TARGETS[80])
    runner = tune.Runner(entry, shape, device)
    assert runner.agrees(other, old), kernel
    seconds = tune.measured([old, other], {"a": runner}, timing.clock_for(device), 1)
    assert all(value["a"] > 0 for value in seconds.values())
    runner.results = tuple(x.clone() for x in runner.results)
    assert not runner.agrees(other, old), "nothing was written, so NaN is left"
print("three kernels")
"""


def test_kernels_of_an_entry_run_alone() -> None:
    """Each kernel launched by itself with other tiles, in the interpreter, gives the same results."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent.parent, check=False
    )
    assert result.returncode == 0 and "three kernels" in result.stdout, result.stderr[-3000:]
