"""What is particular to two-stream attention: layouts that must agree, padding, leaks, autocast, opcheck, errors."""

from __future__ import annotations

from collections.abc import Iterator

import flash_standin
import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mapet_kernels import (
    prefix_suffix_attention,
    two_stream_attention,
    two_stream_attention_packed,
    visibility,
)
from mapet_kernels.backends import ATTENTION_BACKENDS
from mapet_kernels.prefix_suffix_attention.op import prefix_suffix_attention_op
from mapet_kernels.registry import REGISTRY, TwoStreamShape
from mapet_kernels.two_stream_attention.op import two_stream_attention_op, two_stream_attention_packed_op

each_backend = pytest.mark.parametrize("backend", ["reference", "sdpa", "flash"])


@pytest.fixture(autouse=True)
def flash_stands_in() -> Iterator[None]:
    """Backend "flash" takes CPU tensors."""
    with flash_standin.used():
        yield


def make(shape: TwoStreamShape, dtype: torch.dtype = torch.float64):
    case = REGISTRY["two_stream_attention"].make_case(shape, dtype)
    return case.inputs, case.options


@each_backend
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


@each_backend
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


class Made(TorchDispatchMode):
    """What is made inside: (op, tensor), the tensor's memory being none of the op's arguments'."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.tensors += [(func.name(), x) for x in results if x.untyped_storage()._cdata not in given]
        return result

    def shapes(self, op: str) -> list[torch.Size]:
        """Of what an op made, but for what is empty."""
        return [x.shape for name, x in self.tensors if name == op and x.numel()]


BACKWARD = "mapet_kernels::two_stream_attention_backward"


def test_nothing_stands_between_the_op_and_its_outputs() -> None:
    """Each output is the op's own, in memory of its own: no slices, whose gradients would be padded and added."""
    inputs, options = make(TwoStreamShape(17, 5, image_order=True))
    content, query = two_stream_attention(**{name: x.requires_grad_() for name, x in inputs.items()}, **options)
    assert content.grad_fn is query.grad_fn and "two_stream_attention" in content.grad_fn.name()
    assert {type(node).__name__ for node, _ in query.grad_fn.next_functions if node} == {"AccumulateGrad"}
    for out in (content, query):
        assert out.is_contiguous() and out.untyped_storage().nbytes() == out.numel() * out.element_size()


@each_backend
def test_the_backward_pass_makes_the_gradients_and_nothing_else(backend: str) -> None:
    inputs, options = make(TwoStreamShape(17, 5))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    outputs = two_stream_attention(**leaves, **options, backend=backend)
    weights = [torch.randn_like(out) for out in outputs]
    with Made() as made:
        torch.autograd.grad(outputs, list(leaves.values()), weights)
    assert made.shapes(BACKWARD) == [x.shape for x in leaves.values()] and len(made.tensors) == len(leaves)


@each_backend
@pytest.mark.parametrize("cuts", [5, (5, 11)])
@pytest.mark.parametrize("image_order", [False, True])
def test_an_output_without_a_gradient_costs_one_buffer_of_zeros(backend: str, cuts, image_order: bool) -> None:
    """Its gradient is 0: the content stream is left out, the query stream gets zeros."""
    inputs, options = make(TwoStreamShape(17, cuts, image_order=image_order))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    outputs = two_stream_attention(**leaves, **options, backend=backend)
    weights = [torch.randn_like(out) for out in outputs]
    shapes = [x.shape for x in leaves.values()]
    for used, zeros, gradients in ((1, "q_content", shapes[1:]), (0, "q_query", shapes)):
        zeroed = [w if i == used else torch.zeros_like(w) for i, w in enumerate(weights)]
        expected = torch.autograd.grad(outputs, list(leaves.values()), zeroed, retain_graph=True)
        with Made() as made:
            actual = torch.autograd.grad(outputs[used], list(leaves.values()), weights[used], retain_graph=True)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
        assert made.shapes("aten::zeros_like") == [inputs[zeros].shape] and made.shapes(BACKWARD) == gradients
        assert {name for name, _ in made.tensors} == {"aten::zeros_like", BACKWARD}


@pytest.mark.parametrize(("used", "both"), [(0, True), (1, False)])
def test_an_output_without_a_gradient_compiles(used: int, both: bool) -> None:
    """Whether the compiled function returns the other output or drops it."""
    inputs, options = make(TwoStreamShape(11, 4))

    def call(**inputs):
        outputs = two_stream_attention(**inputs, **options)
        return outputs if both else outputs[used : used + 1]

    torch._dynamo.reset()
    gradients = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        out = function(**leaves)[used if both else 0]
        gradients.append(torch.autograd.grad(out.square().sum(), list(leaves.values())))
    torch.testing.assert_close(gradients[1], gradients[0])


@each_backend
def test_outputs_can_be_used_twice_and_the_graph_kept(backend: str) -> None:
    inputs, options = make(TwoStreamShape(11, 4))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    content, query = two_stream_attention(**leaves, **options, backend=backend)
    loss = content.sum() + (content * content).sum() + query.sum() + (2 * query).sum()
    twice = [torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for _ in range(2)]
    content, query = two_stream_attention(**leaves, **options, backend=backend)
    once = torch.autograd.grad((content, query), list(leaves.values()), (1 + 2 * content.detach(), 3 + 0 * query))
    for first, second, expected in zip(*twice, once, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected)


@each_backend
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


@each_backend
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


@each_backend
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
    if backend in ATTENTION_BACKENDS:
        blind = prefix_suffix_attention(q, k, k, torch.full((5,), -3), backend=backend)
        assert blind.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_backend
def test_autocast_runs_in_the_dtype_of_the_region(backend: str, dtype: torch.dtype) -> None:
    inputs, options = make(TwoStreamShape(17, 5), torch.float32)
    expected = two_stream_attention(**{n: x.to(dtype) for n, x in inputs.items()}, **options, backend=backend)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    leaves["q_query"] = leaves["q_query"].detach().to(dtype).requires_grad_()  # mixed dtypes are cast too
    with torch.autocast("cpu", dtype):
        actual = two_stream_attention(**leaves, **options, backend=backend)
        if backend in ATTENTION_BACKENDS:
            k, shift = leaves["k"], visibility.causal_shifts(29)
            assert prefix_suffix_attention(k, k, leaves["v"], shift, backend=backend).dtype == dtype
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)
    gradients = torch.autograd.grad(actual[0].float().sum() + actual[1].float().sum(), list(leaves.values()))
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves.values()]


@each_backend
def test_opcheck(backend: str) -> None:
    """torch.library's own checks: schema, autograd registration, fake tensors, AOT dispatch (assertion 10)."""
    inputs, options = make(TwoStreamShape(9, 4, size=16, image_order=True), torch.float32)
    q_content, q_query, k, v = (x.requires_grad_() for x in inputs.values())
    opcheck(two_stream_attention_op, (q_content, q_query, k, v, 4, None, options["perm"], True, 0.25, backend))
    opcheck(two_stream_attention_op, (None, q_query, k, v, -1, torch.tensor([4, 6]), None, True, 0.25, backend))
    q = torch.randn(2 * 19, 2, 16, requires_grad=True)
    kv = torch.randn(2, 14, 2, 2, 16, requires_grad=True)
    opcheck(two_stream_attention_packed_op, (q, kv, 4, 5, True, 0.25, backend))
    if backend not in ATTENTION_BACKENDS:
        return
    shift = visibility.causal_shifts(5)
    opcheck(prefix_suffix_attention_op, (q_query, k, v, shift, 4, None, 5, 0.25, backend))
