"""Wrong calls of the attention ops: every error says what was given, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_two_stream_attention import make
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mapet_kernels import prefix_suffix_attention, two_stream_attention, two_stream_attention_packed, visibility
from mapet_kernels.registry import TwoStreamShape
from mapet_kernels.two_stream_attention import op

INPUTS, OPTIONS = make(TwoStreamShape(9, 4), torch.float32)
Q, K, V = (INPUTS[name] for name in ("q_query", "k", "v"))
PERM, SHIFT = torch.arange(9).repeat(2, 1), torch.arange(5)
FLAT, KV = torch.zeros(2 * 19, 2, 32), torch.zeros(2, 14, 2, 2, 32)


def two(**changes):
    """Two-stream attention of two images, N 9 and T 5."""
    return two_stream_attention(**{**INPUTS, **OPTIONS, **changes})


def one(**changes):
    """Attention of 5 rows to 14 keys."""
    return prefix_suffix_attention(**{"q": Q, "k": K, "v": V, "shift": SHIFT, **changes})


def packed(**changes):
    """The first of them on the flat buffer."""
    return two_stream_attention_packed(**{"q": FLAT, "kv": KV, "cut": 4, "targets": 5, **changes})


CALLS = pytest.mark.parametrize("call", [two, one])
WANTED = r"an int or an integer tensor \(B,\), got"
ON_ANOTHER = "must be on the device of the other tensors, cpu, or on the CPU, got meta"


@pytest.mark.parametrize(
    ("call", "changes", "error", "text"),
    [
        (two, {"cut": 5}, ValueError, r"cut must be N - T = 4 .* got 5"),
        (two, {"cut": torch.tensor([4.0, 4.0])}, ValueError, r"integers \(B,\) = \(2,\), got torch.float32"),
        (two, {"perm": PERM[:, :8]}, ValueError, r"perm must be integers \(B, N\) = \(2, 9\)"),
        (two, {"perm": PERM.to("meta")}, ValueError, rf"perm {ON_ANOTHER}: perm\.to"),
        (two, {"v": V[:, 1:]}, ValueError, "k and v must both be"),
        (two, {"q_content": K[:, 1:]}, ValueError, "q_content must have the shape of k"),
        (two, {"k": K.double()}, TypeError, r"share one floating-point dtype, got .*float64"),
        (two, {"q_query": Q[:, :0]}, ValueError, "no rows"),
        (one, {"shift": torch.zeros(3)}, ValueError, r"shift must be integers"),
        (one, {"shift": SHIFT.to("meta")}, ValueError, f"shift {ON_ANOTHER}"),
        (one, {"suffix_keys": 15}, ValueError, r"suffix_keys must be in \[0, 14\]"),
        (one, {"suffix_keys": 2.0}, TypeError, r"suffix_keys must be an int, got float 2\.0"),
        (packed, {"q": FLAT[1:]}, ValueError, r"q must be \(38 or, query rows only, 10, 2, 32\)"),
        (packed, {"kv": KV.numpy()}, TypeError, r"kv must be a torch\.Tensor, got numpy\.ndarray"),
        (packed, {"targets": 5.0}, TypeError, r"targets must be an int, got float 5\.0"),
        (
            packed,
            {"cut": torch.tensor([4, 4])},
            TypeError,
            r"cut must be an int \(two_stream_attention takes one per image\), got a tensor \(2,\)",
        ),
    ],
    ids=lambda x: getattr(x, "__name__", None) or (next(iter(x)) if isinstance(x, dict) else ""),
)
def test_errors_say_what_is_allowed(call: Callable, changes: dict, error: type[Exception], text: str) -> None:
    call()
    with pytest.raises(error, match=text):
        call(**changes)


@CALLS
@pytest.mark.parametrize(
    ("cut", "error", "text"),
    [
        (4.0, TypeError, r"an int or an integer tensor \(B,\), got float 4\.0$"),
        ([4, 4], TypeError, r"an int or an integer tensor \(B,\), got list: torch\.tensor\(cut\)$"),
        (
            np.array([4, 4]),
            TypeError,
            r"an int or an integer tensor \(B,\), got numpy\.ndarray: torch\.from_numpy\(cut\)$",
        ),
        (True, TypeError, r"an int or an integer tensor \(B,\), got bool True$"),
        (None, TypeError, r"an int or an integer tensor \(B,\), got NoneType None$"),
        (torch.tensor(4), ValueError, r".*got torch\.int64 \(\): int\(cut\) is one cut for all images"),
        (torch.tensor([True, True]), ValueError, r".*got torch\.bool \(2,\)"),
        (torch.tensor([4, 4], device="meta"), ValueError, rf"{ON_ANOTHER.removeprefix('must be ')}: cut\.to"),
    ],
    ids=repr,
)
def test_what_is_no_cut_is_told_so(call: Callable, cut, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"cut must be {text}"):
        call(cut=cut)
    assert call(cut=np.int64(4)) is not None


@pytest.mark.parametrize(
    ("call", "name", "value"),
    [(two, "k", K), (two, "q_content", K), (two, "perm", PERM), (one, "q", Q), (one, "shift", SHIFT)],
)
def test_an_array_is_told_to_become_a_tensor(call: Callable, name: str, value: Tensor) -> None:
    text = rf"^{name} must be a torch\.Tensor, got numpy\.ndarray: torch\.from_numpy\({name}\)$"
    with pytest.raises(TypeError, match=text):
        call(**{name: value.numpy()})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16], ids=str)
@pytest.mark.parametrize(
    ("rank", "value", "flaw"),
    [(7, 3, "3 at ranks 2 and 7"), (7, 9, "9 at rank 7"), (4, -1, "-1 at rank 4"), (0, 20000, "20000 at rank 0")],
)
def test_a_perm_that_is_no_permutation_is_refused(rank: int, value: int, flaw: str, dtype: torch.dtype) -> None:
    """Twice the same, out of range, negative; the image is named."""
    inputs, _ = make(TwoStreamShape(9, 4, batch=3), torch.float32)
    perm = torch.tensor([1, 0, 3, 2, 4, 5, 8, 6, 7]).repeat(3, 1).to(dtype)
    two_stream_attention(**inputs, cut=4, perm=perm)
    perm[2, rank] = value
    text = rf"perm must hold every number from 0 to 8 once per image, but image 2 has {flaw}$"
    with pytest.raises(ValueError, match=text):
        two_stream_attention(**inputs, cut=4, perm=perm)


@pytest.mark.parametrize("cut", [3, 9, -1])
def test_a_cut_out_of_range_is_refused_by_its_image(cut: int) -> None:
    inputs, _ = make(TwoStreamShape(9, (4, 6, 4), batch=3), torch.float32)
    with pytest.raises(ValueError, match=rf"every cut must be in \[4, 8\] for N = 9 .*, but image 1 has {cut}$"):
        two_stream_attention(**inputs, cut=torch.tensor([4, cut, 4], dtype=torch.int32))


@pytest.mark.parametrize("cut", [3, 5, -1])
def test_the_op_itself_takes_no_other_cut(cut: int) -> None:
    with pytest.raises(ValueError, match=rf"cut must be N - T = 4 and not negative, got {cut}"):
        op.two_stream_attention_op(*INPUTS.values(), cut, None, None, True, 0.25, "sdpa")


def test_values_are_not_read_where_there_are_none() -> None:
    """Another device, fake tensors, torch.fx's tracing, and compiled code, which then runs with other values."""
    inputs, options = make(TwoStreamShape(9, (4, 6), image_order=True), torch.float32)

    def call(q_content, q_query, k, v, cut, perm):
        return two_stream_attention(q_content, q_query, k, v, cut, perm=perm)

    arguments = (*inputs.values(), options["cut"], options["perm"])
    away = call(*(x.to("meta") for x in arguments))  # as on a GPU, where reading them would wait
    with FakeTensorMode() as mode:
        fake = call(*map(mode.from_tensor, arguments))
    with FakeTensorMode(allow_non_fake_inputs=True):
        mixed = call(*arguments)
    for results in (away, fake, mixed):
        assert [x.shape for x in results] == [inputs["q_content"].shape, inputs["q_query"].shape]
    others = (*arguments[:4], torch.tensor([8, 4]), options["perm"].flip(1))
    for tracing_mode in ("real", "fake", "symbolic"):
        with torch.no_grad():
            traced = make_fx(call, tracing_mode=tracing_mode)(*arguments)
        assert all(torch.equal(a, e) for a, e in zip(traced(*others), call(*others), strict=True))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for given in (arguments, others):
        assert all(torch.equal(a, e) for a, e in zip(compiled(*given), call(*given), strict=True))


@pytest.mark.parametrize("cut", [8, (8, 10)])
@pytest.mark.parametrize(("made", "given", "said"), [(False, True, "without"), (True, False, "with")])
def test_a_forgotten_mask_tokens_is_named(cut, made: bool, given: bool, said: str) -> None:
    inputs, options = make(TwoStreamShape(17, cut, mask_tokens=made), torch.float32)
    text = rf"rows of k and v fit {said} mask-token rows: then mask_tokens={made} is needed$"
    with pytest.raises(ValueError, match=text):
        two_stream_attention(**inputs, **options | {"mask_tokens": given})


@pytest.mark.parametrize("swapped", [("q_query", "k", "v", "q_content"), ("k", "v"), ("q_query",), ("q_content",)])
def test_heads_before_rows_are_told_to_be_transposed(swapped: tuple[str, ...]) -> None:
    inputs, options = make(TwoStreamShape(9, 4, heads=3), torch.float32)
    given = {name: x.transpose(1, 2) if name in swapped else x for name, x in inputs.items()}
    text = rf"With dimensions 1 and 2 of {', '.join(swapped)} swapped the shapes fit.*needs transpose\(1, 2\)$"
    with pytest.raises(ValueError, match=text):
        two_stream_attention(**given, **options)
    with pytest.raises(ValueError) as refused:
        two_stream_attention(**given | {"v": inputs["v"][:, 1:]}, **options)
    assert "transpose" not in str(refused.value), "swapping would not help"


def test_heads_before_rows_in_prefix_suffix_attention_and_where_it_is_compiled() -> None:
    x, shift = torch.randn(2, 3, 7, 8), torch.arange(7)
    text = r"With dimensions 1 and 2 of q, k, v swapped the shapes fit.*transpose\(1, 2\)$"
    for keys in (x, torch.randn(2, 3, 9, 8)):
        with pytest.raises(ValueError, match=text):
            prefix_suffix_attention(x, keys, keys, shift)
    compiled = torch.compile(lambda **given: two_stream_attention(**given, **OPTIONS), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"transpose\(1, 2\)"):
        compiled(**{name: x.transpose(1, 2) for name, x in INPUTS.items()})


@pytest.mark.parametrize("call", [two, one, packed])
def test_scale_is_a_number_greater_than_zero(call: Callable) -> None:
    with pytest.raises(TypeError, match="scale must be a number, got a tensor, which would get no gradient"):
        call(scale=torch.tensor(0.5))
    for scale, given in ((True, "bool True"), ("0.5", "str 0.5"), ([0.5], "list"), (np.bool_(1), "numpy.bool")):
        with pytest.raises(TypeError, match=f"scale must be a number, got {given}"):
            call(scale=scale)
    for scale in (0, -0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"scale must be finite and > 0 \(None is .* = 0\.1768\), got {scale}$"):
            call(scale=scale)
    for scale in (2, np.float32(2), np.float64(2)):
        torch.testing.assert_close(call(scale=scale), call(scale=2.0), rtol=0, atol=0)


def test_scale_is_the_factor_of_the_scores() -> None:
    half = two(**{name: INPUTS[name] * 2 for name in ("q_content", "q_query")}, scale=0.25)
    torch.testing.assert_close(half, two(scale=0.5))


def test_forward_mode_is_refused_not_taken_for_zero() -> None:
    def of_k(k):
        return two(k=k)[1]

    with pytest.raises(ValueError, match=r"k has a tangent, but the op has no forward-mode derivative \(jvp\)"):
        torch.func.jvp(of_k, (K,), (K,))
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(ValueError, match="q has a tangent"):
            one(q=torch.autograd.forward_ad.make_dual(Q, Q))
        of_k(K)


@pytest.mark.parametrize("prefix", [-1, 11])
def test_a_prefix_is_part_of_the_tokens(prefix: int) -> None:
    with pytest.raises(ValueError, match=rf"prefix must be in \[0, 10\], the number of tokens, got {prefix}"):
        visibility.prefix_lm_shifts(10, prefix)


def test_permutations_under_vmap_are_not_looked_at() -> None:
    perms = torch.rand(3, 2, 9).argsort(dim=2)

    def attend(perm):
        return two(perm=perm, backend="sdpa")[1]

    torch.testing.assert_close(torch.func.vmap(attend)(perms), torch.stack([attend(perm) for perm in perms]))
