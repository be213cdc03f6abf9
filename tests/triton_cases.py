"""The Triton kernels in Triton's interpreter; test_triton_interpreter.py runs this file with TRITON_INTERPRET=1.

TRITON_RANDOM_SHAPES=10000 sets the number of random shapes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import outputs_and_gradients, with_inputs
from triton_checks import (
    assert_same_bits,
    check_error_budget,
    check_gradients,
    check_random,
    poison,
    run,
    set_tiles,
    tiles,
    turned,
    unaligned,
)

from mapet_kernels.attention_launch import rows_are_aligned
from mapet_kernels.backends import choose_backend
from mapet_kernels.registry import REGISTRY, TwoStreamShape
from mapet_kernels.two_stream_attention import triton_backend, two_stream_attention, two_stream_attention_packed
from mapet_kernels.two_stream_attention.problem import Problem, Streams

SPEC = REGISTRY["two_stream_attention"]
SMALL = [name for name, shape in SPEC.shapes.items() if shape.tokens < 97]
TINY = {
    "mapet": TwoStreamShape(7, 3, heads=1, size=4),
    "cut_per_image": TwoStreamShape(6, (5, 0), heads=1, size=4, image_order=True),
    "last_block": TwoStreamShape(7, 3, batch=1, heads=2, size=4, with_content=False),
    "pim_blind_row": TwoStreamShape(5, 0, batch=1, heads=1, size=4, mask_tokens=False),
}
RANDOM_SHAPES = int(os.environ.get("TRITON_RANDOM_SHAPES", "25"))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty fills with NaN."""
    with poison(monkeypatch):
        yield


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float16) for name in SPEC.shapes] + [(name, torch.float32) for name in SMALL],
    ids=str,
)
def test_error_budget(poisoned: None, name: str, dtype: torch.dtype) -> None:
    """The registry's shapes with the tiles of the launch table; large shapes in fp16, as its tiles are larger."""
    check_error_budget(SPEC, SPEC.make_case(SPEC.shapes[name], dtype), dtype)


@pytest.mark.parametrize("size", [1, 8, 16, 24, 64, 80, 128])
def test_head_sizes(poisoned: None, size: int) -> None:
    check_error_budget(SPEC, SPEC.make_case(TwoStreamShape(19, 6, size=size, batch=1), torch.float32), torch.float32)


@pytest.mark.parametrize(("tokens", "cut"), [(1025, 700), (2048, 1990)])
def test_long_sequences(poisoned: None, tokens: int, cut: int) -> None:
    """512-pixel images and beyond in the last block; the tiles of the launch table."""
    shape = TwoStreamShape(tokens, cut, 1, 1, size=16, with_content=False)
    check_error_budget(SPEC, SPEC.make_case(shape, torch.float16), torch.float16)


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


@settings(max_examples=RANDOM_SHAPES, deadline=None, derandomize=True, database=None)
@given(shape=shapes(), forward=tiles(), dq=tiles(), dkv=tiles(), seed=st.integers(0, 2**16))
def test_random_shapes(
    shape: TwoStreamShape, forward: tuple[int, int], dq: tuple[int, int], dkv: tuple[int, int], seed: int
) -> None:
    """Shapes, options and tiles at random, so that tiles end anywhere."""
    check_random(SPEC, SPEC.make_case(shape, torch.float64, seed=seed), forward, dq, dkv)


@pytest.mark.parametrize("name", TINY)
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Gradients against finite differences in float64 along random directions."""
    set_tiles(monkeypatch, (32, 16), (32, 16), (16, 16))
    check_gradients(SPEC, SPEC.make_case(TINY[name], torch.float64))


@pytest.mark.parametrize("name", ["cut_1", "cut_per_image", "last_block_image_order", "pim_cut_per_image"])
def test_strided_inputs_with_poisoned_gaps(poisoned: None, name: str) -> None:
    """Views into buffers whose other half is NaN give the bits of contiguous inputs."""
    case = SPEC.make_case(SPEC.shapes[name], torch.float32)
    assert_same_bits(run(SPEC, case, torch.float32, strided=True), run(SPEC, case, torch.float32))


def test_rows_that_start_anywhere_and_strides_of_the_last_dimension() -> None:
    """Unaligned rows, and a last dimension that is not contiguous, give the bits of a plain tensor."""
    case = SPEC.make_case(TwoStreamShape(19, 6, size=16), torch.float16)
    inputs = with_inputs(case, torch.float16)
    expected = two_stream_attention(**inputs, **case.options, backend="triton")
    odd = unaligned(inputs)
    assert not any(rows_are_aligned(x) for x in odd.values()) and all(rows_are_aligned(x) for x in inputs.values())
    for other in (odd, turned(inputs)):
        assert_same_bits(two_stream_attention(**other, **case.options, backend="triton"), expected)


@pytest.mark.parametrize("with_content", [True, False])
def test_what_padding_rows_hold_reaches_no_result(with_content: bool) -> None:
    """With one cut per image: NaN in every row of targets that do not exist gives the bits of zeros there."""
    shape = TwoStreamShape(6, (1, 4), heads=1, with_content=with_content)
    case = SPEC.make_case(shape, torch.float32)
    results = []
    for filling in (0.0, float("nan")):
        inputs = with_inputs(case, torch.float32)
        with torch.no_grad():
            for name, x in inputs.items():
                real = 6 - 4 if name == "q_query" else 6 + 6 - 4
                x[1, real:] = filling
        outputs, gradients = outputs_and_gradients(SPEC.function, inputs, case.options, backend="triton")
        results.append([*outputs, *gradients.values()])
    assert_same_bits(*results)
    assert all(x.isfinite().all() for x in results[1])


@pytest.mark.parametrize("mask_tokens", [True, False])
def test_wrong_numbers_move_no_access_out_of_a_tensor(mask_tokens: bool) -> None:
    """Garbage for permutations and cuts: NaN around every tensor reaches no result, and no store lands on it."""
    batch, tokens, targets, heads, size = 2, 19, 12, 2, 16
    generator = torch.Generator().manual_seed(0)
    whole: list[torch.Tensor] = []

    def fenced(rows: int, *last: int) -> torch.Tensor:
        """Random (B, rows, H, ...) between as much NaN before and after it."""
        whole.append(torch.full((3 * batch, rows, heads, *last), float("nan")))
        inside = whole[-1][batch : 2 * batch]
        return inside.copy_(torch.randn(inside.shape, generator=generator))

    content = tokens + targets if mask_tokens else tokens
    q, out, d_out, dq = (Streams(fenced(content, size), fenced(targets, size)) for _ in range(4))
    k, v, dk, dv = (fenced(content, size) for _ in range(4))
    lse = Streams(fenced(content), fenced(targets))
    perm = torch.randint(-(2**40), 2**40, (batch, tokens), generator=generator)
    for cuts in (torch.tensor([-5, 2**40]), torch.tensor([3, tokens + 7])):
        problem = Problem(tokens, targets, cuts, mask_tokens, 0.25)
        triton_backend.forward(q, k, v, out, lse, problem, perm)
        triton_backend.backward(d_out, q, k, v, out, lse, dq, dk, dv, problem, perm)
        for x in whole:
            assert x[:batch].isnan().all() and x[2 * batch :].isnan().all()
            assert not x[batch : 2 * batch].isnan().any()


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


@pytest.mark.parametrize("scale", [0.03, 0.7, 3.0])
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
    assert_same_bits(run(SPEC, case, torch.float16), run(SPEC, case, torch.float16))


def test_compiles_without_graph_break() -> None:
    case = SPEC.make_case(SPEC.shapes["one_target"], torch.float32)
    compiled = torch.compile(SPEC.function, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(SPEC, case, torch.float32, function=compiled), run(SPEC, case, torch.float32))


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
