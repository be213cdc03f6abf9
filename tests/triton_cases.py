"""The Triton kernels in Triton's interpreter; test_triton_interpreter.py runs this file with TRITON_INTERPRET=1.

TRITON_RANDOM_SHAPES=10000 sets the number of random shapes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import outputs_and_gradients, tensors, with_inputs

from mapet_kernels import launch
from mapet_kernels.backends import choose_backend
from mapet_kernels.launch import LaunchConfig
from mapet_kernels.registry import REGISTRY, Case, TwoStreamShape
from mapet_kernels.two_stream_attention import two_stream_attention, two_stream_attention_packed
from mapet_kernels.two_stream_attention.triton_backend import rows_are_aligned

SPEC = REGISTRY["two_stream_attention"]
SMALL = [name for name, shape in SPEC.shapes.items() if shape.tokens < 97]
TINY = {
    "mapet": TwoStreamShape(7, 3, heads=1, size=4),
    "cut_per_image": TwoStreamShape(6, (5, 0), heads=1, size=4, image_order=True),
    "last_block": TwoStreamShape(7, 3, batch=1, heads=2, size=4, with_content=False),
    "pim_blind_row": TwoStreamShape(5, 0, batch=1, heads=1, size=4, mask_tokens=False),
}
RANDOM_SHAPES = int(os.environ.get("TRITON_RANDOM_SHAPES", "300"))


def check_error_budget(case: Case, dtype: torch.dtype) -> None:
    """Outputs and gradients of the kernels against float64, in units of plain torch's error."""
    exact, exact_gradients = outputs_and_gradients(SPEC.plain, with_inputs(case, torch.float64), case.options)
    plain, plain_gradients = outputs_and_gradients(SPEC.plain, with_inputs(case, dtype), case.options)
    actual, gradients = outputs_and_gradients(SPEC.function, with_inputs(case, dtype), case.options, backend="triton")
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert_within_budget(a, p, e, factor=FORWARD_FACTOR, what=f"output {i}")
    for name, a in gradients.items():
        assert_within_budget(
            a, plain_gradients[name], exact_gradients[name], factor=GRADIENT_FACTOR, what=f"gradient of {name}"
        )


@contextmanager
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, torch.empty fills with NaN: an element that is not written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with poison(monkeypatch):
        yield


def set_tiles(monkeypatch: pytest.MonkeyPatch, *configs: tuple[int, int]) -> None:
    """Use these (rows, keys) for the forward, dQ and dK/dV kernels."""
    kernels = ("two_stream_forward", "two_stream_query_gradient", "two_stream_key_gradient")
    for name, (rows, keys) in zip(kernels, configs, strict=True):
        config = LaunchConfig(rows, keys, warps=4, stages=1)
        monkeypatch.setattr(launch, name, lambda *_, config=config: config)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float16) for name in SPEC.shapes] + [(name, torch.float32) for name in SMALL],
    ids=str,
)
def test_error_budget(poisoned: None, name: str, dtype: torch.dtype) -> None:
    """The registry's shapes with the tiles of the launch table; large shapes in fp16, as its tiles are larger."""
    check_error_budget(SPEC.make_case(SPEC.shapes[name], dtype), dtype)


@pytest.mark.parametrize("size", [1, 8, 16, 24, 64, 80, 128])
def test_head_sizes(poisoned: None, size: int) -> None:
    check_error_budget(SPEC.make_case(TwoStreamShape(19, 6, size=size, batch=1), torch.float32), torch.float32)


@pytest.mark.parametrize(("tokens", "cut"), [(1025, 700), (2048, 1990)])
def test_long_sequences(poisoned: None, tokens: int, cut: int) -> None:
    """512-pixel images and beyond; the tiles of the launch table."""
    check_error_budget(SPEC.make_case(TwoStreamShape(tokens, cut, 1, 1, size=16), torch.float16), torch.float16)


@st.composite
def shapes(draw: st.DrawFn) -> TwoStreamShape:
    """Up to 40 tokens, mostly up to 16 (the interpreter is slow), and every option of the op."""
    tokens = draw(st.one_of(*[st.integers(1, 16)] * 9, st.integers(17, 40)))
    batch, heads = draw(st.sampled_from(((1, 1), (1, 2), (2, 1))))
    one_cut = st.integers(0, tokens - 1)
    return TwoStreamShape(
        tokens,
        draw(st.one_of(one_cut, st.tuples(*[one_cut] * batch))),
        batch,
        heads,
        size=draw(st.sampled_from((8, 16, 24, 32))),
        mask_tokens=draw(st.booleans()),
        image_order=draw(st.booleans()),
        with_content=draw(st.booleans()),
    )


def tiles() -> st.SearchStrategy[tuple[int, int]]:
    """(rows, keys) of a kernel."""
    return st.tuples(st.sampled_from((16, 32)), st.sampled_from((16, 32)))


@settings(max_examples=RANDOM_SHAPES, deadline=None, derandomize=True, database=None)
@given(shape=shapes(), forward=tiles(), dq=tiles(), dkv=tiles(), seed=st.integers(0, 2**16))
def test_random_shapes(
    shape: TwoStreamShape, forward: tuple[int, int], dq: tuple[int, int], dkv: tuple[int, int], seed: int
) -> None:
    """Shapes, options and tiles at random, so that tiles end anywhere.

    In float64: with two tokens plain torch's own rounding error, the budget, is a matter of luck in fewer digits. In a
    thread: under pytest and hypothesis the interpreter's calls cross a chunk of Python's stack, and Python 3.11 maps
    and unmaps memory each time.
    """
    with pytest.MonkeyPatch.context() as monkeypatch, poison(monkeypatch), ThreadPoolExecutor(1) as shallow:
        set_tiles(monkeypatch, forward, dq, dkv)
        case = SPEC.make_case(shape, torch.float64, seed=seed)
        shallow.submit(check_error_budget, case, torch.float64).result()


@pytest.mark.parametrize("name", TINY)
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Gradients against finite differences in float64 along random directions."""
    set_tiles(monkeypatch, (32, 16), (32, 16), (16, 16))
    case = SPEC.make_case(TINY[name], torch.float64)
    inputs = with_inputs(case, torch.float64)

    def function(*values: torch.Tensor):
        return tuple(tensors(SPEC.function(**dict(zip(inputs, values, strict=True)), **case.options, backend="triton")))

    assert torch.autograd.gradcheck(function, list(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("name", ["cut_1", "cut_per_image", "last_block_image_order", "pim_cut_per_image"])
def test_strided_inputs_with_poisoned_gaps(poisoned: None, name: str) -> None:
    """Views into buffers whose other half is NaN give the bits of contiguous inputs."""
    case = SPEC.make_case(SPEC.shapes[name], torch.float32)
    dense, strided = (
        outputs_and_gradients(
            SPEC.function, with_inputs(case, torch.float32, strided=gaps), case.options, backend="triton"
        )
        for gaps in (False, True)
    )
    for a, b in zip([*dense[0], *dense[1].values()], [*strided[0], *strided[1].values()], strict=True):
        assert torch.equal(a, b)


def test_rows_that_start_anywhere_and_strides_of_the_last_dimension() -> None:
    """Unaligned rows, and a last dimension that is not contiguous, give the bits of a plain tensor."""
    case = SPEC.make_case(TwoStreamShape(19, 6, size=16), torch.float16)
    inputs = with_inputs(case, torch.float16)
    expected = two_stream_attention(**inputs, **case.options, backend="triton")
    odd = {name: torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view(x.shape) for name, x in inputs.items()}
    assert not any(rows_are_aligned(x) for x in odd.values()) and all(rows_are_aligned(x) for x in inputs.values())
    turned = {name: x.detach().transpose(1, 3).contiguous().transpose(1, 3) for name, x in inputs.items()}
    for other in (odd, turned):
        for a, b in zip(two_stream_attention(**other, **case.options, backend="triton"), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("with_content", [True, False])
@pytest.mark.parametrize("mask_tokens", [True, False])
def test_packed_layout(poisoned: None, mask_tokens: bool, with_content: bool) -> None:
    """Keys and values in halves of one tensor, and their gradients too."""
    batch, tokens, targets, heads, size = 2, 19, 12, 2, 16
    rows = tokens + targets if mask_tokens else tokens
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch * (rows * with_content + targets), heads, size, generator=generator).requires_grad_()
    kv = torch.randn(batch, rows, 2, heads, size, generator=generator).requires_grad_()
    results = []
    for backend in ("reference", "triton"):
        out = two_stream_attention_packed(q, kv, tokens - targets, targets, mask_tokens=mask_tokens, backend=backend)
        results.append([out, *torch.autograd.grad((out * out).sum(), (q, kv))])
    for reference, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_scales_and_large_scores(scale: float) -> None:
    """Any factor of the scores; scores so large that only differences to the maximum can be exponentiated."""
    case = SPEC.make_case(TwoStreamShape(19, 6, size=16), torch.float64)
    inputs = {name: x.double().requires_grad_() for name, x in case.inputs.items()}
    with torch.no_grad():
        inputs["k"] *= 200
    results = []
    for backend in ("reference", "triton"):
        results.append(outputs_and_gradients(two_stream_attention, inputs, case.options, scale=scale, backend=backend))
    for reference, actual in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-10, atol=1e-12)
    for name, reference in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], reference, rtol=1e-9, atol=1e-9)


def test_results_repeat_bit_for_bit() -> None:
    case = SPEC.make_case(SPEC.shapes["image_order_cut_per_image"], torch.float16)
    runs = [
        outputs_and_gradients(SPEC.function, with_inputs(case, torch.float16), case.options, backend="triton")
        for _ in range(2)
    ]
    for a, b in zip([*runs[0][0], *runs[0][1].values()], [*runs[1][0], *runs[1][1].values()], strict=True):
        assert torch.equal(a, b)


def test_compiles_without_graph_break() -> None:
    case = SPEC.make_case(SPEC.shapes["one_target"], torch.float32)
    eager = outputs_and_gradients(SPEC.function, with_inputs(case, torch.float32), case.options, backend="triton")
    compiled = torch.compile(SPEC.function, fullgraph=True, backend="aot_eager")
    traced = outputs_and_gradients(compiled, with_inputs(case, torch.float32), case.options, backend="triton")
    for a, b in zip([*eager[0], *eager[1].values()], [*traced[0], *traced[1].values()], strict=True):
        assert torch.equal(a, b)


def test_what_cannot_run_is_refused() -> None:
    case = SPEC.make_case(SPEC.shapes["one_target"], torch.float32)
    half = {name: x.bfloat16() for name, x in case.inputs.items()}
    with pytest.raises(ValueError, match=r"cannot run here: TRITON_INTERPRET=1 computes bfloat16 wrongly; use float16"):
        two_stream_attention(**half, **case.options, backend="triton")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="computes bfloat16 wrongly"):
        two_stream_attention(**case.inputs, **case.options, backend="triton")
    wide = SPEC.make_case(TwoStreamShape(3, 1, size=129), torch.float32)
    with pytest.raises(ValueError, match="head sizes 1 to 128, got 129"):
        two_stream_attention(**wide.inputs, **wide.options, backend="triton")
    with pytest.raises(ValueError, match="takes CPU tensors, not cuda"):
        choose_backend("triton", "cuda", torch.float16, ("triton",))
    assert choose_backend("auto", "cpu", torch.float32, ("reference", "sdpa", "triton")) == "sdpa"
