"""What is particular to two-stream attention: layouts that must agree, padding, leaks, autocast, opcheck, errors."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from mapet_kernels import (
    backends,
    prefix_suffix_attention,
    two_stream_attention,
    two_stream_attention_packed,
    visibility,
)
from mapet_kernels.backends import TWO_STREAM_BACKENDS, available_backends, choose_backend
from mapet_kernels.prefix_suffix_attention.op import prefix_suffix_attention_op
from mapet_kernels.registry import REGISTRY, TwoStreamShape
from mapet_kernels.two_stream_attention.op import two_stream_attention_op, two_stream_attention_packed_op

BACKENDS = ["reference", "sdpa"]


def make(shape: TwoStreamShape, dtype: torch.dtype = torch.float64):
    case = REGISTRY["two_stream_attention"].make_case(shape, dtype)
    return case.inputs, case.options


@pytest.mark.parametrize("backend", BACKENDS)
def test_image_order_is_permuted_order_scattered(backend: str) -> None:
    inputs, options = make(TwoStreamShape(31, 9, image_order=True))
    perm = options.pop("perm")
    images = torch.arange(2).unsqueeze(1)
    order = torch.cat([perm, torch.arange(31, 53).expand(2, -1)], dim=1)
    permuted = {name: x if name == "q_query" else x[images, order] for name, x in inputs.items()}
    content, query = two_stream_attention(**permuted, **options, backend=backend)
    image_content, image_query = two_stream_attention(**inputs, **options, perm=perm, backend=backend)
    torch.testing.assert_close(image_content[images, order], content)
    torch.testing.assert_close(image_query, query)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_tokens", [True, False])
def test_packed_layout_equals_separate_tensors(backend: str, mask_tokens: bool) -> None:
    inputs, options = make(TwoStreamShape(31, 9, mask_tokens=mask_tokens))
    q = torch.cat([inputs["q_content"].flatten(0, 1), inputs["q_query"].flatten(0, 1)]).requires_grad_()
    kv = torch.stack([inputs["k"], inputs["v"]], dim=2).requires_grad_()
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    content, query = two_stream_attention(**leaves, **options, backend=backend)
    packed = two_stream_attention_packed(q, kv, 9, 22, mask_tokens=mask_tokens, backend=backend)
    flat = torch.cat([content.flatten(0, 1), query.flatten(0, 1)])
    torch.testing.assert_close(packed, flat)
    weights = torch.sin(torch.arange(flat.numel(), dtype=flat.dtype)).view_as(flat)
    dq, dkv = torch.autograd.grad(packed, (q, kv), weights)
    separate = torch.autograd.grad(flat, list(leaves.values()), weights)
    torch.testing.assert_close(dq, torch.cat([separate[0].flatten(0, 1), separate[1].flatten(0, 1)]))
    torch.testing.assert_close(dkv, torch.stack(separate[2:], dim=2))
    last = two_stream_attention_packed(q[-44:], kv, 9, 22, mask_tokens=mask_tokens, backend=backend)
    torch.testing.assert_close(last, packed[-44:])


def test_both_outputs_are_views_of_one_buffer() -> None:
    inputs, options = make(TwoStreamShape(17, 5))
    content, query = two_stream_attention(**inputs, **options)
    assert content.untyped_storage().data_ptr() == query.untyped_storage().data_ptr()
    assert query.storage_offset() == content.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_rows_are_zero_and_leave_no_trace(backend: str) -> None:
    """With one cut per image, whatever stands in padding rows changes no output and gets no gradient."""
    inputs, options = make(TwoStreamShape(13, (4, 9), image_order=True))
    before = two_stream_attention(**inputs, **options, backend=backend)
    assert before[0][1, 13 + 4 :].abs().max() == 0 and before[1][1, 4:].abs().max() == 0
    poisoned = {name: x.clone() for name, x in inputs.items()}
    poisoned["q_query"][1, 4:] = 1e6
    for name in ("q_content", "k", "v"):
        poisoned[name][1, 17:] = 1e6
    leaves = {name: x.requires_grad_() for name, x in poisoned.items()}
    after = two_stream_attention(**leaves, **options, backend=backend)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    gradients = dict(
        zip(leaves, torch.autograd.grad(sum(x.square().sum() for x in after), leaves.values()), strict=True)
    )
    assert gradients["q_query"][1, 4:].abs().max() == 0
    assert all(gradients[name][1, 17:].abs().max() == 0 for name in ("q_content", "k", "v"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_leak_from_a_target_to_itself_or_to_earlier_ones(backend: str) -> None:
    """Query row i has no gradient with respect to the content keys and values of targets >= i."""
    inputs, options = make(TwoStreamShape(11, 4, batch=1))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    _, query = two_stream_attention(**leaves, **options, backend=backend)
    for i in range(7):
        dk, dv = torch.autograd.grad(query[:, i].sum(), (leaves["k"], leaves["v"]), retain_graph=True)
        for gradient in (dk, dv):
            seen = gradient.abs().sum((0, 2, 3)) > 0
            assert seen.tolist() == [j < 4 + i for j in range(11)] + [j >= i for j in range(7)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_sees_nothing_is_zero_with_finite_gradients(backend: str) -> None:
    """Reliability, assertion 14."""
    inputs, options = make(TwoStreamShape(7, 0, mask_tokens=False))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    _, query = two_stream_attention(**leaves, **options, backend=backend)
    assert query[:, 0].abs().max() == 0 and query[:, 1].abs().max() > 0
    gradients = torch.autograd.grad(query.square().sum() + query[:, 0].sum(), list(leaves.values()), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert gradients[1][:, 0].abs().max() == 0
    q, k = torch.randn(2, 5, 2, 8), torch.randn(2, 9, 2, 8)
    blind = prefix_suffix_attention(q, k, k, torch.full((5,), -3), backend=backend)
    assert blind.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_in_the_dtype_of_the_region(backend: str, dtype: torch.dtype) -> None:
    inputs, options = make(TwoStreamShape(17, 5), torch.float32)
    expected = two_stream_attention(**{n: x.to(dtype) for n, x in inputs.items()}, **options, backend=backend)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    leaves["q_query"] = leaves["q_query"].detach().to(dtype).requires_grad_()  # mixed dtypes are cast too
    with torch.autocast("cpu", dtype):
        actual = two_stream_attention(**leaves, **options, backend=backend)
        single = prefix_suffix_attention(
            leaves["k"], leaves["k"], leaves["v"], visibility.causal_shifts(29), backend=backend
        )
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)
    assert single.dtype == dtype
    gradients = torch.autograd.grad(actual[0].float().sum() + actual[1].float().sum(), list(leaves.values()))
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves.values()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    """torch.library's own checks: schema, autograd registration, fake tensors, AOT dispatch (assertion 10)."""
    inputs, options = make(TwoStreamShape(9, 4, size=16, image_order=True), torch.float32)
    q_content, q_query, k, v = (x.requires_grad_() for x in inputs.values())
    opcheck(two_stream_attention_op, (q_content, q_query, k, v, 4, None, options["perm"], True, 0.25, backend))
    opcheck(two_stream_attention_op, (None, q_query, k, v, -1, torch.tensor([4, 6]), None, True, 0.25, backend))
    q = torch.randn(2 * 19, 2, 16, requires_grad=True)
    kv = torch.randn(2, 14, 2, 2, 16, requires_grad=True)
    opcheck(two_stream_attention_packed_op, (q, kv, 4, 5, True, 0.25, backend))
    shift = visibility.causal_shifts(5)
    opcheck(prefix_suffix_attention_op, (q_query, k, v, shift, 4, None, 5, 0.25, backend))


def test_errors_say_what_is_allowed() -> None:
    inputs, options = make(TwoStreamShape(9, 4), torch.float32)

    def call(**changes):
        return two_stream_attention(**{**inputs, **options, **changes})

    with pytest.raises(ValueError, match=r"cut must be N - T = 4 .* got 5"):
        call(cut=5)
    with pytest.raises(ValueError, match=r"every cut must be in \[4, 8\].* got 2 to 4"):
        call(cut=torch.tensor([4, 2]))
    with pytest.raises(ValueError, match=r"integers \(B,\) = \(2,\), got torch.float32"):
        call(cut=torch.tensor([4.0, 4.0]))
    with pytest.raises(ValueError, match=r"perm must be integers \(B, N\) = \(2, 9\)"):
        call(perm=torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="k and v must both be"):
        call(v=inputs["v"][:, 1:])
    with pytest.raises(ValueError, match="q_content must have the shape of k"):
        call(q_content=inputs["q_content"][:, 1:])
    with pytest.raises(TypeError, match=r"share one floating-point dtype, got .*float64"):
        call(k=inputs["k"].double())
    with pytest.raises(ValueError, match="no rows"):
        call(q_query=inputs["q_query"][:, :0])
    with pytest.raises(ValueError, match=r"shift must be integers"):
        prefix_suffix_attention(inputs["q_query"], inputs["k"], inputs["v"], torch.zeros(3))
    with pytest.raises(ValueError, match=r"suffix_keys must be in \[0, 14\]"):
        prefix_suffix_attention(
            inputs["q_query"], inputs["k"], inputs["v"], torch.zeros(5, dtype=torch.int64), suffix_keys=15
        )
    with pytest.raises(ValueError, match=r"q must be \(38 or, query rows only, 10, 2, 32\)"):
        two_stream_attention_packed(torch.zeros(37, 2, 32), torch.zeros(2, 14, 2, 2, 32), 4, 5)


def test_backend_choice_is_a_pure_function_of_the_device() -> None:
    assert choose_backend("auto", "cpu") == "sdpa" and choose_backend("auto", "cuda") == "sdpa"
    assert choose_backend("auto", "meta") == "reference"
    assert choose_backend("auto", "cpu", torch.bfloat16) == "sdpa", "an op without matmul"
    assert choose_backend("auto", "cpu", torch.bfloat16, TWO_STREAM_BACKENDS) == "matmul"
    assert choose_backend("auto", "cpu", torch.float16, TWO_STREAM_BACKENDS) == "sdpa"
    available = available_backends("cpu")
    assert available.keys() == set(TWO_STREAM_BACKENDS) and available["sdpa"] is available["matmul"] is None
    with pytest.raises(ValueError, match="cannot run here: needs a CPU or CUDA device, not meta"):
        choose_backend("sdpa", "meta")


def test_auto_takes_triton_on_a_gpu_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided by device, dtype and head size; a V100 or float64 falls back to torch's attention, or the reference."""
    monkeypatch.setattr(backends, "reason_against_triton", lambda device, dtype: None)
    assert choose_backend("auto", "cuda:1", torch.bfloat16, TWO_STREAM_BACKENDS, 128) == "triton"
    assert choose_backend("auto", "cuda", torch.float32, ("reference", "triton")) == "triton"
    assert choose_backend("auto", "cuda", torch.bfloat16, TWO_STREAM_BACKENDS, 129) == "sdpa"
    assert choose_backend("auto", "cpu", torch.float32, TWO_STREAM_BACKENDS, 64) == "sdpa"
    monkeypatch.setattr(backends, "reason_against_triton", lambda device, dtype: "too old")
    assert choose_backend("auto", "cuda", torch.float16, TWO_STREAM_BACKENDS, 64) == "sdpa"
    assert choose_backend("auto", "cuda", torch.float16, ("reference", "triton")) == "reference"
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: too old"):
        choose_backend("triton", "cuda", torch.float16, TWO_STREAM_BACKENDS, 64)
