"""How an op is added (CONTRIBUTING.md): one OpSpec, and the tests of all ops run on it.

An op is written here and registered. pytest with this file as a plugin (-p test_adding_an_op) registers it before the
tests are collected; a second one, whose gradient is wrong, shows that they would find a mistake.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mapet_kernels.backends import choose_listed_backend
from mapet_kernels.registration import autocast_dtype, register_autocast
from mapet_kernels.registry import REGISTRY, Case, OpSpec

TESTS = Path(__file__).parent
BACKENDS = ("reference", "exponential")


# What reference.py holds, and one more backend.
def forward(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    """x * sigmoid(weight)."""
    work = torch.promote_types(x.dtype, torch.float32)
    gate = weight.to(work).sigmoid() if backend == "reference" else 1 / (1 + weight.to(work).neg().exp())
    return (x.to(work) * gate).to(x.dtype)


def backward(d_out: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    work = torch.promote_types(x.dtype, torch.float32)
    gate, d_out = weight.to(work).sigmoid(), d_out.to(work)
    return (d_out * gate).to(x.dtype), (d_out * x.to(work) * gate * (1 - gate)).to(x.dtype)


# What op.py holds.
@torch.library.custom_op("mapet_test::toy_gate", mutates_args=())
def toy_gate_op(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    return forward(x, weight, backend)


toy_gate_op.register_fake(lambda x, weight, backend: torch.empty_like(x, memory_format=torch.contiguous_format))
toy_gate_op.register_autograd(
    lambda ctx, d_out: (*backward(d_out, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
)
register_autocast(toy_gate_op)


def toy_gate(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """The public function."""
    return toy_gate_op(x, weight, choose_listed_backend(backend, BACKENDS, x.device, autocast_dtype(x)))


# What registry.py holds.
@dataclass(frozen=True)
class GateShape:
    """A matrix."""

    rows: int
    width: int


def make_case(shape: GateShape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(shape.rows, shape.width, generator=generator).to(device, dtype) for _ in range(2))
    return Case({"x": x, "weight": weight})


SPEC = OpSpec(
    name="toy_gate",
    function=toy_gate,
    plain=lambda x, weight: x * weight.sigmoid(),
    make_case=make_case,
    shapes={"one": GateShape(1, 1), "prime": GateShape(97, 13)},
    cost=lambda shape, dtype: (shape.rows * shape.width, 3 * shape.rows * shape.width * dtype.itemsize),
    backends=BACKENDS,
)
WRONG = dataclasses.replace(SPEC, name="toy_wrong", plain=lambda x, weight: x * (1.01 * weight).sigmoid())


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin."""
    REGISTRY.update({SPEC.name: SPEC, WRONG.name: WRONG})


def test_the_tests_of_all_ops_run_on_a_new_one() -> None:
    """In every dtype and backend, without another line; and on a wrong one they fail."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-v", "-p", "test_adding_an_op", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "test_ops.py", "-k", "toy"], capture_output=True, text=True, env=environment, cwd=TESTS, check=False
    )
    outcomes = re.findall(r"::(\w+)\[(toy_\w+?)[-\]]\S* (PASSED|FAILED)", done.stdout)
    right = [(test, outcome) for test, op, outcome in outcomes if op == SPEC.name]
    assert {outcome for _, outcome in right} == {"PASSED"}, done.stdout[-4000:]
    counts = {test: sum(name == test for name, _ in right) for test, _ in right}
    ways = len(SPEC.shapes) * len(BACKENDS)
    assert counts == {
        "test_error_budget": ways * 4,
        "test_strided_inputs_with_poisoned_gaps": ways,
        "test_poisoned_allocations": ways,
        "test_gradcheck": ways,
        "test_another_default_device_changes_nothing": ways,
        "test_compiles_without_graph_break_or_recompilation": 1,
        "test_unknown_backend_is_named": 1,
        "test_cost_is_positive_and_grows_with_the_dtype": 1,
    }
    failed = {test for test, op, outcome in outcomes if op == WRONG.name and outcome == "FAILED"}
    assert failed == {"test_error_budget"}, "a wrong op was not found"


def test_the_benchmarks_take_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its costliest test shape."""
    from bench import kernels_suite
    from bench.options import Options

    monkeypatch.setattr(kernels_suite, "REGISTRY", {SPEC.name: SPEC})
    (contest,) = kernels_suite.contests(Options(dtype=("fp32",)), torch.device("cpu"))
    assert contest.sizes["label"] == "prime" and set(contest.ways) == {*BACKENDS, kernels_suite.PLAIN}
