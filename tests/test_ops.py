"""Every op of the registry x shape x backend x dtype: error budget, strides, poison, gradcheck, torch.compile.

On CPU tensors: backends that run there, "flash" over a stand-in (flash_standin.py), "cuda" by its source run thread by
thread (emulation.py), and in a process with TRITON_INTERPRET=1 "triton" instead (test_triton_interpreter.py).
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import emulation
import flash_standin
import pytest
import torch
import torch._dynamo.testing
from op_checks import (
    assert_same_bits,
    check,
    check_gradients,
    default_device,
    flop,
    outputs_and_gradients,
    poisoned,
    run,
    with_inputs,
)

from mapet_kernels.backends import INTERPRETED
from mapet_kernels.registry import REGISTRY, OpSpec

SMALL, TINY, TINIEST = 2e7, 2e6, 4.5e5
"""FLOP of shapes that are tried in more than one way; of the interpreter in every dtype; in more than one way."""


def backends(spec: OpSpec) -> tuple[str, ...]:
    """Those that run in this process on CPU tensors."""
    if INTERPRETED:
        return ("triton",) * ("triton" in spec.gpu_backends)
    stood_in = ("flash",) * ("flash" in spec.gpu_backends)
    return (*spec.backends, *stood_in, *("cuda",) * (spec.name in emulation.EMULATED))


def dtypes(spec: OpSpec, backend: str, shape: str) -> tuple[torch.dtype, ...]:
    """What a backend is tried in: kernels on large shapes in one dtype."""
    if backend == "triton":  # larger shapes in fp16, as its tiles are larger
        return (torch.float16, torch.float32)[: 1 + (flop(spec, shape) < TINY)]
    if backend == "cuda":
        return emulation.DTYPES[spec.name][: None if flop(spec, shape) < SMALL else 1]
    return spec.dtypes


def cases(specs: list[OpSpec] | None = None, *, dtype: torch.dtype | None = None, gradients: bool = False) -> list[Any]:
    """Parameters (spec, shape, backend) of small shapes; of all shapes and with their dtypes where none is given."""
    return [
        pytest.param(spec, shape, backend, *of, id="-".join((spec.name, shape, backend, *map(str, of))))
        for spec in specs or REGISTRY.values()
        if spec.differentiable or not gradients
        for shape in spec.shapes
        if dtype is None or flop(spec, shape) < (TINIEST if INTERPRETED else SMALL)
        for backend in backends(spec)
        if dtype is None or backend == "triton" or dtype in dtypes(spec, backend, shape)
        for of in ([(x,) for x in dtypes(spec, backend, shape)] if dtype is None else [()])
    ]


def given(spec: OpSpec, shape: str, backend: str, **changes: int) -> Any:
    """The shape; in the interpreter, which is slow, with changes to what has heads."""
    found = spec.shapes[shape]
    return dataclasses.replace(found, **changes) if backend == "triton" and hasattr(found, "heads") else found


def on(spec: OpSpec, backend: str) -> Any:
    """Inside, the backend takes CPU tensors."""
    if backend == "flash":
        return flash_standin.used()
    return emulation.EMULATED[spec.name]() if backend == "cuda" else nullcontext()


each_op = pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY.keys())


@pytest.mark.parametrize(("spec", "shape", "backend", "dtype"), cases())
def test_error_budget(spec: OpSpec, shape: str, backend: str, dtype: torch.dtype) -> None:
    """Outputs and gradients against float64 (reliability, assertion 11); ids, which have none, equal float64's."""
    one = {"batch": 1, "heads": 1} if flop(spec, shape) > TINY else {}
    with on(spec, backend), poisoned() if backend == "triton" else nullcontext():
        check(spec, spec.make_case(given(spec, shape, backend, **one), dtype), dtype, backend=backend)


@pytest.mark.parametrize(("spec", "shape", "backend"), cases(dtype=torch.float32, gradients=True))
def test_strided_inputs_with_poisoned_gaps(spec: OpSpec, shape: str, backend: str) -> None:
    """Views into buffers whose other half is NaN give the numbers of contiguous ones, of Triton's kernels the bits."""
    case = spec.make_case(spec.shapes[shape], torch.float32)
    with on(spec, backend):
        dense, strided = (run(spec, case, torch.float32, strided=strided, backend=backend) for strided in (False, True))
    if backend == "triton":
        assert_same_bits(strided, dense)
    torch.testing.assert_close(strided, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("spec", "shape", "backend"), cases(dtype=torch.float32, gradients=True))
def test_poisoned_allocations(spec: OpSpec, shape: str, backend: str) -> None:
    """Every element of every output and gradient is written: uninitialised memory is NaN here."""
    case = spec.make_case(spec.shapes[shape], torch.float32)
    with on(spec, backend), poisoned():
        assert all(x.isfinite().all() for x in run(spec, case, torch.float32, backend=backend))


@pytest.mark.parametrize(("spec", "shape", "backend"), cases(dtype=torch.float64, gradients=True))
def test_gradcheck(spec: OpSpec, shape: str, backend: str) -> None:
    """Gradients against finite differences in float64 along random directions (reliability, assertion 10)."""
    if backend == "triton" and spec.name == "permuted_embed" and shape != "small":
        pytest.skip("10 seconds in the interpreter")
    case = spec.make_case(given(spec, shape, backend, heads=1, size=4), torch.float64)
    with on(spec, backend):
        check_gradients(spec, case, backend=backend)


@pytest.mark.parametrize(("spec", "shape", "backend"), cases(dtype=torch.float32))
def test_another_default_device_changes_nothing(spec: OpSpec, shape: str, backend: str) -> None:
    """What the ops allocate is on the device of their inputs, not on torch.set_default_device's."""
    case = spec.make_case(spec.shapes[shape], torch.float32)
    with on(spec, backend):
        expected = run(spec, case, torch.float32, backend=backend)
        with default_device("meta"):
            found = run(spec, case, torch.float32, backend=backend)
    assert_same_bits(found, expected)


@each_op
def test_compiles_without_graph_break_or_recompilation(spec: OpSpec) -> None:
    """torch.compile(fullgraph=True) gives the eager result, and a second call compiles nothing (assertion 18)."""
    options = {"backend": "triton"} if INTERPRETED else {}
    shape = next(iter(spec.shapes.values()))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(spec.function, fullgraph=True, backend=counter)
    for seed in (0, 1):
        case = spec.make_case(shape, torch.float32, seed=seed)
        eager, traced = (
            outputs_and_gradients(function, with_inputs(case, torch.float32), case.options, **options)
            for function in (spec.function, compiled)
        )
        torch.testing.assert_close(traced, eager)
    assert counter.frame_count == 1


@each_op
def test_unknown_backend_is_named(spec: OpSpec) -> None:
    case = spec.make_case(next(iter(spec.shapes.values())), torch.float32)
    with pytest.raises(ValueError, match=r"unknown backend 'warp'; backends are auto, .*reference"):
        spec.function(**case.inputs, **case.options, backend="warp")


@each_op
def test_cost_is_positive_and_grows_with_the_dtype(spec: OpSpec) -> None:
    for shape in spec.shapes.values():
        operations, moved = spec.cost(shape, torch.float32)
        assert operations >= 0 and moved > 0
        assert spec.cost(shape, torch.float16)[1] < moved
