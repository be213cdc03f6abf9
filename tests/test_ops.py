"""Every op of the registry x shape x dtype x backend: error budget, strides, poison, gradcheck, torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget
from torch import Tensor

from mapet_kernels.registry import REGISTRY, Case, OpSpec

CASES = [
    pytest.param(spec, shape, backend, id=f"{spec.name}-{shape}-{backend}")
    for spec in REGISTRY.values()
    for shape in spec.shapes
    for backend in spec.backends
]
WITHOUT_GRADIENT = [case for case in CASES if not case.values[0].differentiable]
DIFFERENTIABLE = [case for case in CASES if case.values[0].differentiable]
SMALL = [case for case in DIFFERENTIABLE if not any(word in case.id for word in ("vit", "long", "mim"))]


def tensors(result) -> list[Tensor]:
    """The tensors of a function's result, in order."""
    parts = result if isinstance(result, tuple) else (result,)
    return [part for part in parts if part is not None]


def with_inputs(case: Case, dtype: torch.dtype, *, strided: bool = False) -> dict[str, Tensor]:
    """The case's inputs in `dtype` as leaves that require gradients, or as views into wider buffers."""
    leaves = {}
    for name, value in case.inputs.items():
        value = value.to(dtype)
        if strided:
            value = torch.stack([value, torch.full_like(value, float("nan"))], dim=1)[:, 0]
        leaves[name] = value if name in case.fixed else value.detach().requires_grad_()
    return leaves


def outputs_and_gradients(
    function, inputs: dict[str, Tensor], options: dict, **extra
) -> tuple[list, dict[str, Tensor]]:
    """Outputs, and gradients of sum(output * weights) with weights that are equal in every dtype."""
    out = tensors(function(**inputs, **options, **extra))
    wanted = {name: value for name, value in inputs.items() if value.requires_grad}
    if not wanted:
        return out, {}
    loss = sum((o * torch.cos(torch.arange(o.numel(), device=o.device)).view_as(o).to(o.dtype)).sum() for o in out)
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return [o.detach() for o in out], dict(zip(wanted, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("spec", "shape", "backend"), DIFFERENTIABLE)
def test_error_budget(spec: OpSpec, shape: str, backend: str, dtype: torch.dtype) -> None:
    """Outputs and gradients against float64 (reliability, assertion 11)."""
    if dtype not in spec.dtypes:
        return
    case = spec.make_case(spec.shapes[shape], dtype)
    exact, exact_gradients = outputs_and_gradients(spec.plain, with_inputs(case, torch.float64), case.options)
    plain, plain_gradients = outputs_and_gradients(spec.plain, with_inputs(case, dtype), case.options)
    actual, gradients = outputs_and_gradients(spec.function, with_inputs(case, dtype), case.options, backend=backend)
    assert len(actual) == len(exact)
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert_within_budget(a, p, e, factor=FORWARD_FACTOR, what=f"output {i}")
    for name, gradient in gradients.items():
        assert_within_budget(
            gradient, plain_gradients[name], exact_gradients[name], factor=GRADIENT_FACTOR, what=f"gradient of {name}"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("spec", "shape", "backend"), WITHOUT_GRADIENT)
def test_ops_without_gradient(spec: OpSpec, shape: str, backend: str, dtype: torch.dtype) -> None:
    """Integers equal those of float64 plain torch, numbers are within a few roundings of it."""
    case = spec.make_case(spec.shapes[shape], dtype)
    exact = tensors(spec.plain(**{name: x.double() for name, x in case.inputs.items()}, **case.options))
    actual = tensors(spec.function(**case.inputs, **case.options, backend=backend))
    for a, e in zip(actual, exact, strict=True):
        assert a.shape == e.shape
        if e.is_floating_point():
            assert a.dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(a.double(), e, rtol=16 * torch.finfo(a.dtype).eps, atol=1e-12)
        else:
            assert torch.equal(a, e)


@pytest.mark.parametrize(("spec", "shape", "backend"), SMALL)
def test_strided_inputs_with_poisoned_gaps(spec: OpSpec, shape: str, backend: str) -> None:
    """Inputs that are views into buffers whose other half is NaN give the bits of contiguous ones."""
    case = spec.make_case(spec.shapes[shape], torch.float32)
    dense = outputs_and_gradients(spec.function, with_inputs(case, torch.float32), case.options, backend=backend)
    strided = outputs_and_gradients(
        spec.function, with_inputs(case, torch.float32, strided=True), case.options, backend=backend
    )
    for a, b in zip(dense[0], strided[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for name in dense[1]:
        torch.testing.assert_close(dense[1][name], strided[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("spec", "shape", "backend"), SMALL)
def test_poisoned_allocations(spec: OpSpec, shape: str, backend: str) -> None:
    """Every element of every output and gradient is written: uninitialised memory is NaN here."""
    case = spec.make_case(spec.shapes[shape], torch.float32)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # makes torch.empty fill with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        out, gradients = outputs_and_gradients(
            spec.function, with_inputs(case, torch.float32), case.options, backend=backend
        )
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    for value in [*out, *gradients.values()]:
        assert torch.isfinite(value).all()


@pytest.mark.parametrize(("spec", "shape", "backend"), [c for c in SMALL if "prime" not in c.id and "97" not in c.id])
def test_gradcheck(spec: OpSpec, shape: str, backend: str) -> None:
    """Gradients against finite differences in float64 along random directions (reliability, assertion 10)."""
    case = spec.make_case(spec.shapes[shape], torch.float64)
    inputs = with_inputs(case, torch.float64)
    fixed = {name: value for name, value in inputs.items() if not value.requires_grad}
    names = [name for name in inputs if name not in fixed]

    def function(*values: Tensor):
        return tuple(
            tensors(spec.function(**dict(zip(names, values, strict=True)), **fixed, **case.options, backend=backend))
        )

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names], fast_mode=True)


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY.keys())
def test_compiles_without_graph_break_or_recompilation(spec: OpSpec) -> None:
    """torch.compile(fullgraph=True) gives the eager result, and a second call compiles nothing (assertion 18)."""
    shape = next(iter(spec.shapes.values()))
    case = spec.make_case(shape, torch.float32)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(spec.function, fullgraph=True, backend=counter)
    for seed in (0, 1):
        case = spec.make_case(shape, torch.float32, seed=seed)
        eager = outputs_and_gradients(spec.function, with_inputs(case, torch.float32), case.options)
        traced = outputs_and_gradients(compiled, with_inputs(case, torch.float32), case.options)
        for a, b in zip([*eager[0], *eager[1].values()], [*traced[0], *traced[1].values()], strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY.keys())
def test_unknown_backend_is_named(spec: OpSpec) -> None:
    case = spec.make_case(next(iter(spec.shapes.values())), torch.float32)
    with pytest.raises(ValueError, match=r"'warp'.*reference"):
        spec.function(**case.inputs, **case.options, backend="warp")


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY.keys())
def test_cost_is_positive_and_grows_with_the_dtype(spec: OpSpec) -> None:
    for shape in spec.shapes.values():
        flop, moved = spec.cost(shape, torch.float32)
        assert flop >= 0 and moved > 0
        assert spec.cost(shape, torch.float16)[1] < moved
