"""Wrong calls of the attention ops: every error says what was given, what is allowed and what to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_two_stream_attention import make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mapet_kernels import prefix_suffix_attention, two_stream_attention, two_stream_attention_packed, visibility
from mapet_kernels.registry import TwoStreamShape
from mapet_kernels.two_stream_attention import op


def test_errors_say_what_is_allowed() -> None:
    inputs, options = make(TwoStreamShape(9, 4), torch.float32)

    def call(**changes):
        return two_stream_attention(**{**inputs, **options, **changes})

    with pytest.raises(ValueError, match=r"cut must be N - T = 4 .* got 5"):
        call(cut=5)
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


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16], ids=str)
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


def test_a_cut_out_of_range_is_refused_by_its_image() -> None:
    inputs, options = make(TwoStreamShape(9, (4, 6, 4), batch=3), torch.float32)
    for cut in (3, 9, -1):
        with pytest.raises(ValueError, match=rf"every cut must be in \[4, 8\] for N = 9 .*, but image 1 has {cut}$"):
            two_stream_attention(**inputs, **options | {"cut": torch.tensor([4, cut, 4], dtype=torch.int32)})


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


def test_wrong_types_say_what_is_wanted() -> None:
    inputs, options = make(TwoStreamShape(9, 4), torch.float32)
    q, k, v = (inputs[name] for name in ("q_query", "k", "v"))
    shift, perm = torch.arange(5), torch.arange(9).repeat(2, 1)

    def two(**changes):
        return two_stream_attention(**{**inputs, **options, **changes})

    def one(**changes):
        return prefix_suffix_attention(**{"q": q, "k": k, "v": v, "shift": shift, **changes})

    wanted = r"cut must be an int or an integer tensor \(B,\), got "
    for cut, given in (
        (4.0, r"float 4\.0"),
        ([4, 4], r"list: torch\.tensor\(cut\)"),
        (np.array([4, 4]), r"numpy\.ndarray: torch\.from_numpy\(cut\)"),
        (True, "bool True"),
        (None, "NoneType None"),
    ):
        for call in (two, one):
            with pytest.raises(TypeError, match=f"{wanted}{given}$"):
                call(cut=cut)
    for call in (two, one):
        with pytest.raises(
            ValueError, match=r"cut must be .*got torch\.int64 \(\): int\(cut\) is one cut for all images"
        ):
            call(cut=torch.tensor(4))
        with pytest.raises(ValueError, match=r"cut must be .*got torch\.bool \(2,\)"):
            call(cut=torch.tensor([True, True]))
        with pytest.raises(
            ValueError, match=r"cut must be on the device of the other tensors, cpu, or on the CPU, got meta: cut\.to"
        ):
            call(cut=torch.tensor([4, 4], device="meta"))
        assert call(cut=np.int64(4)) is not None
    for call, name, value in (
        (two, "k", k),
        (two, "q_content", k),
        (two, "perm", perm),
        (one, "q", q),
        (one, "shift", shift),
    ):
        with pytest.raises(
            TypeError, match=rf"^{name} must be a torch\.Tensor, got numpy\.ndarray: torch\.from_numpy\({name}\)$"
        ):
            call(**{name: value.numpy()})
    with pytest.raises(
        ValueError, match=r"perm must be on the device of the other tensors, cpu, or on the CPU, got meta: perm\.to"
    ):
        two(perm=perm.to("meta"))
    with pytest.raises(
        ValueError, match=r"shift must be on the device of the other tensors, cpu, or on the CPU, got meta"
    ):
        one(shift=shift.to("meta"))
    with pytest.raises(TypeError, match=r"suffix_keys must be an int, got float 2\.0"):
        one(suffix_keys=2.0)
    flat, kv = torch.zeros(2 * 19, 2, 32), torch.zeros(2, 14, 2, 2, 32)
    with pytest.raises(
        TypeError, match=r"cut must be an int \(two_stream_attention takes one per image\), got a tensor \(2,\)"
    ):
        two_stream_attention_packed(flat, kv, torch.tensor([4, 4]), 5)
    with pytest.raises(TypeError, match=r"targets must be an int, got float 5\.0"):
        two_stream_attention_packed(flat, kv, 4, 5.0)
    with pytest.raises(TypeError, match=r"kv must be a torch\.Tensor, got numpy\.ndarray"):
        two_stream_attention_packed(flat, kv.numpy(), 4, 5)


@pytest.mark.parametrize("cut", [8, (8, 10)])
def test_a_forgotten_mask_tokens_is_named(cut) -> None:
    shape = TwoStreamShape(17, cut, mask_tokens=False)
    inputs, options = make(shape, torch.float32)
    del options["mask_tokens"]
    with pytest.raises(
        ValueError, match=r"rows of k and v fit without mask-token rows: then mask_tokens=False is needed$"
    ):
        two_stream_attention(**inputs, **options)
    inputs, options = make(TwoStreamShape(17, cut), torch.float32)
    with pytest.raises(ValueError, match=r"rows of k and v fit with mask-token rows: then mask_tokens=True is needed$"):
        two_stream_attention(**inputs, **options | {"mask_tokens": False})


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


def test_heads_before_rows_in_prefix_suffix_attention() -> None:
    x, shift = torch.randn(2, 3, 7, 8), torch.arange(7)
    text = r"With dimensions 1 and 2 of q, k, v swapped the shapes fit.*transpose\(1, 2\)$"
    for keys in (x, torch.randn(2, 3, 9, 8)):
        with pytest.raises(ValueError, match=text):
            prefix_suffix_attention(x, keys, keys, shift)


def test_scale_is_a_number_greater_than_zero() -> None:
    inputs, options = make(TwoStreamShape(9, 4), torch.float64)
    shift = visibility.causal_shifts(14)

    def two(scale):
        return two_stream_attention(**inputs, **options, scale=scale)

    def packed(scale):
        return two_stream_attention_packed(torch.ones(2 * 19, 2, 32), torch.ones(2, 14, 2, 2, 32), 4, 5, scale=scale)

    def one(scale):
        return prefix_suffix_attention(inputs["k"], inputs["k"], inputs["v"], shift, scale=scale)

    for call in (two, packed, one):
        with pytest.raises(TypeError, match="scale must be a number, got a tensor, which would get no gradient"):
            call(torch.tensor(0.5))
        for scale, given in ((True, "bool True"), ("0.5", "str 0.5"), ([0.5], "list"), (np.bool_(1), "numpy.bool")):
            with pytest.raises(TypeError, match=f"scale must be a number, got {given}"):
                call(scale)
        for scale in (0, -0.5, float("nan"), float("inf")):
            with pytest.raises(
                ValueError, match=rf"scale must be finite and > 0 \(None is .* = 0\.1768\), got {scale}$"
            ):
                call(scale)
        assert call(2) is not None
    expected = two(0.5)
    for scale in (np.float64(0.5), np.float32(0.5)):
        assert all(torch.equal(a, e) for a, e in zip(two(scale), expected, strict=True))
    half = two_stream_attention(**inputs | {n: inputs[n] * 2 for n in ("q_content", "q_query")}, **options, scale=0.25)
    torch.testing.assert_close(half, expected)


def test_forward_mode_is_refused_not_taken_for_zero() -> None:
    inputs, options = make(TwoStreamShape(9, 4), torch.float32)

    def of_k(k):
        return two_stream_attention(**inputs | {"k": k}, **options)[1]

    with pytest.raises(ValueError, match=r"k has a tangent, but the op has no forward-mode derivative \(jvp\)"):
        torch.func.jvp(of_k, (inputs["k"],), (inputs["k"],))
    q = inputs["q_query"]
    shift = torch.zeros(5, dtype=torch.int64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(ValueError, match="q has a tangent"):
            prefix_suffix_attention(dual, inputs["k"], inputs["v"], shift)
        of_k(inputs["k"])


def test_a_wrong_layout_is_told_where_it_is_compiled() -> None:
    inputs, options = make(TwoStreamShape(9, 4), torch.float32)
    swapped = {name: x.transpose(1, 2) for name, x in inputs.items()}
    compiled = torch.compile(lambda **given: two_stream_attention(**given, **options), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"transpose\(1, 2\)"):
        compiled(**swapped)


@pytest.mark.parametrize("prefix", [-1, 11])
def test_a_prefix_is_part_of_the_tokens(prefix: int) -> None:
    with pytest.raises(ValueError, match=rf"prefix must be in \[0, 10\], the number of tokens, got {prefix}"):
        visibility.prefix_lm_shifts(10, prefix)


def test_permutations_under_vmap_are_not_looked_at() -> None:
    inputs, _ = make(TwoStreamShape(9, 4), torch.float32)
    perms = torch.rand(3, 2, 9).argsort(dim=2)

    def attend(perm):
        return two_stream_attention(**inputs, cut=4, perm=perm, backend="sdpa")[1]

    expected = torch.stack([attend(perm) for perm in perms])
    torch.testing.assert_close(torch.func.vmap(attend)(perms), expected)


def test_the_op_itself_takes_no_other_cut() -> None:
    inputs, _ = make(TwoStreamShape(9, 4), torch.float32)
    for cut in (3, 5, -1):
        with pytest.raises(ValueError, match=rf"cut must be N - T = 4 and not negative, got {cut}"):
            op.two_stream_attention_op(*inputs.values(), cut, None, None, True, 0.25, "sdpa")
