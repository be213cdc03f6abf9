"""What the tests of the Triton kernels share: the error budget, poisoned memory, tiles and exact comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget
from hypothesis import strategies as st
from test_ops import outputs_and_gradients, tensors, with_inputs

from mapet_kernels import launch
from mapet_kernels.launch import LaunchConfig
from mapet_kernels.registry import Case, OpSpec


def check_error_budget(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    """Outputs and gradients of the kernels against float64, in units of plain torch's error."""
    exact, exact_gradients = outputs_and_gradients(spec.plain, with_inputs(case, torch.float64), case.options)
    plain, plain_gradients = outputs_and_gradients(spec.plain, with_inputs(case, dtype), case.options)
    actual, gradients = outputs_and_gradients(spec.function, with_inputs(case, dtype), case.options, backend="triton")
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert_within_budget(a, p, e, factor=FORWARD_FACTOR, what=f"output {i}")
    for name, a in gradients.items():
        assert_within_budget(
            a, plain_gradients[name], exact_gradients[name], factor=GRADIENT_FACTOR, what=f"gradient of {name}"
        )


def check_random(spec: OpSpec, case: Case, forward: tuple[int, int], dq: tuple[int, int], dkv: tuple[int, int]) -> None:
    """The error budget in float64 with these tiles of the three kernels, in poisoned memory.

    In float64: with few keys plain torch's own rounding error, the budget, is a matter of luck in fewer digits. In a
    thread: under pytest and hypothesis the interpreter's calls cross a chunk of Python's stack, and Python 3.11 maps
    and unmaps memory each time.
    """
    with pytest.MonkeyPatch.context() as monkeypatch, poison(monkeypatch), ThreadPoolExecutor(1) as shallow:
        set_tiles(monkeypatch, forward, dq, dkv)
        shallow.submit(check_error_budget, spec, case, torch.float64).result()


@contextmanager
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, torch.empty fills with NaN: an element that is not written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def set_tiles(monkeypatch: pytest.MonkeyPatch, *configs: tuple[int, int]) -> None:
    """Use these (rows, keys) for the forward, dQ and dK/dV kernels."""
    kernels = ("attention_forward", "attention_query_gradient", "attention_key_gradient")
    for name, (rows, keys) in zip(kernels, configs, strict=True):
        config = LaunchConfig(rows, keys, warps=4, stages=1)
        monkeypatch.setattr(launch, name, lambda *_, config=config: config)


def tiles() -> st.SearchStrategy[tuple[int, int]]:
    """(rows, keys) of a kernel."""
    return st.tuples(st.sampled_from((16, 32)), st.sampled_from((16, 32)))


def check_gradients(spec: OpSpec, case: Case) -> None:
    """Gradients against finite differences in float64 along random directions."""
    inputs = with_inputs(case, torch.float64)

    def function(*values: torch.Tensor):
        return tuple(tensors(spec.function(**dict(zip(inputs, values, strict=True)), **case.options, backend="triton")))

    assert torch.autograd.gradcheck(function, list(inputs.values()), fast_mode=True)


def run(spec: OpSpec, case: Case, dtype: torch.dtype, *, strided: bool = False, function: Callable | None = None):
    """All outputs and gradients of the kernels; inputs, if `strided`, are views into buffers with NaN in between."""
    inputs = with_inputs(case, dtype, strided=strided)
    outputs, gradients = outputs_and_gradients(function or spec.function, inputs, case.options, backend="triton")
    return [*outputs, *gradients.values()]


def assert_same_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Equal tensors, pair by pair."""
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def unaligned(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values with rows that do not start at multiples of 16 bytes."""
    return {name: torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view(x.shape) for name, x in inputs.items()}


def turned(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values with a last dimension that is not contiguous."""
    return {name: x.detach().transpose(1, 3).contiguous().transpose(1, 3) for name, x in inputs.items()}
