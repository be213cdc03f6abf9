"""What the tests of ops share: every case of the registry against float64, and memory in which mistakes show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget
from torch import Tensor

from mapet_kernels import launch
from mapet_kernels.launch import LaunchConfig
from mapet_kernels.registry import Case, OpSpec


def flop(spec: OpSpec, shape: str) -> int:
    """Of a shape's forward pass: what a test may take follows from it."""
    return spec.cost(spec.shapes[shape], torch.float32)[0]


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


def check(
    spec: OpSpec, case: Case, dtype: torch.dtype, inputs: dict[str, Tensor] | None = None, rounding: float = 16, **extra
) -> list[Tensor]:
    """Outputs and gradients of the op, each within the error budget against float64 (tests/budget.py).

    Of an op without gradients integers equal those of float64 plain torch, and numbers are within `rounding` epsilons.
    """
    exact, exact_gradients = outputs_and_gradients(spec.plain, with_inputs(case, torch.float64), case.options)
    actual, gradients = outputs_and_gradients(spec.function, inputs or with_inputs(case, dtype), case.options, **extra)
    assert len(actual) == len(exact)
    if not spec.differentiable:
        for a, e in zip(actual, exact, strict=True):
            assert a.shape == e.shape
            if e.is_floating_point():
                assert a.dtype == torch.promote_types(dtype, torch.float32)
                torch.testing.assert_close(a.double(), e, rtol=rounding * torch.finfo(a.dtype).eps, atol=1e-12)
            else:
                assert torch.equal(a, e)
        return actual
    plain, plain_gradients = outputs_and_gradients(spec.plain, with_inputs(case, dtype), case.options)
    for i, parts in enumerate(zip(actual, plain, exact, strict=True)):
        assert_within_budget(*parts, factor=FORWARD_FACTOR, what=f"output {i}")
    for name, gradient in gradients.items():
        parts = gradient, plain_gradients[name], exact_gradients[name]
        assert_within_budget(*parts, factor=GRADIENT_FACTOR, what=f"gradient of {name}")
    return [*actual, *gradients.values()]


def check_gradients(spec: OpSpec, case: Case, **extra) -> None:
    """Gradients against finite differences in float64 along random directions."""
    inputs = with_inputs(case, torch.float64)
    fixed = {name: value for name, value in inputs.items() if not value.requires_grad}
    names = [name for name in inputs if name not in fixed]

    def function(*values: Tensor):
        return tuple(tensors(spec.function(**dict(zip(names, values, strict=True)), **fixed, **case.options, **extra)))

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names], fast_mode=True)


def run(
    spec: OpSpec, case: Case, dtype: torch.dtype, *, strided: bool = False, function: Callable | None = None, **extra
) -> list[Tensor]:
    """All outputs and gradients of the op; inputs, if `strided`, are views into buffers with NaN in between."""
    inputs = with_inputs(case, dtype, strided=strided)
    outputs, gradients = outputs_and_gradients(function or spec.function, inputs, case.options, **extra)
    return [*outputs, *gradients.values()]


def assert_same_bits(actual, expected) -> None:
    """Equal tensors, pair by pair."""
    for a, b in zip(*(x if isinstance(x, list) else tensors(x) for x in (actual, expected)), strict=True):
        assert torch.equal(a, b)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty fills with NaN, integers with their largest: an element that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextmanager
def default_device(name: str) -> Iterator[None]:
    """Inside, torch makes tensors there unless it is told where."""
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


class Fences:
    """Tensors between as much NaN before and after them: a wrong index reads NaN, or writes into it."""

    def __init__(self) -> None:
        self.memories: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)

    def fenced(self, *shape: int, value: float | None = None) -> Tensor:
        """A tensor of random numbers, or of one value."""
        memory = torch.full((3 * shape[0], *shape[1:]), torch.nan)
        self.memories.append(memory)
        inside = memory[shape[0] : 2 * shape[0]]
        return inside.copy_(torch.randn(shape, generator=self.generator) if value is None else torch.full((), value))

    def assert_whole(self) -> None:
        """Nothing was written beyond a tensor, and no NaN was read from there into one."""
        for memory in self.memories:
            before, inside, after = memory.chunk(3)
            assert before.isnan().all() and after.isnan().all(), "written beyond the tensor"
            assert not inside.isnan().any(), "read beyond a tensor, or not written"


GARBAGE = torch.tensor([-(2**62), -(2**31), -7, -1, 9, 20, 2**31, 2**40 + 3, 2**62])
"""What no permutation and no cut holds."""


def off_by_one(x: Tensor) -> Tensor:
    """The same numbers one element after the start of their memory, so that no row is aligned."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    return memory[1:].view(x.shape).copy_(x.detach())


def turned(x: Tensor) -> Tensor:
    """The same numbers with a last dimension that is not contiguous."""
    return x.detach().transpose(1, -1).contiguous().transpose(1, -1)


def set_tiles(monkeypatch: pytest.MonkeyPatch, *configs: tuple[int, int]) -> None:
    """Use these (rows, keys) for Triton's forward, dQ and dK/dV kernels of attention."""
    kernels = ("attention_forward", "attention_query_gradient", "attention_key_gradient")
    for name, (rows, keys) in zip(kernels, configs, strict=True):
        config = LaunchConfig(rows, keys, warps=4, stages=1)
        monkeypatch.setattr(launch, name, lambda *_, config=config: config)
