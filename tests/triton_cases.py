"""The Triton kernels of attention in Triton's interpreter, beyond test_ops.py; test_triton_interpreter.py runs it.

TRITON_RANDOM_SHAPES=10000 sets the number of random shapes of two-stream attention.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    Fences,
    assert_same_bits,
    check,
    check_gradients,
    off_by_one,
    outputs_and_gradients,
    poisoned,
    run,
    set_tiles,
    turned,
    with_inputs,
)
from torch import Tensor

from mapet_kernels import launch, prefix_suffix_attention, two_stream_attention_packed
from mapet_kernels.attention_launch import rows_are_aligned
from mapet_kernels.backends import choose_backend
from mapet_kernels.prefix_suffix_attention import op
from mapet_kernels.prefix_suffix_attention import problem as prefix_suffix
from mapet_kernels.prefix_suffix_attention import triton_backend as prefix_suffix_backend
from mapet_kernels.registry import REGISTRY, Case, OpSpec, PrefixSuffixShape, TwoStreamShape
from mapet_kernels.two_stream_attention import triton_backend
from mapet_kernels.two_stream_attention.problem import Problem, Streams
from mapet_kernels.visibility import bidirectional_shifts, causal_shifts, prefix_suffix_mask, two_stream_shifts

TWO, ONE = REGISTRY["two_stream_attention"], REGISTRY["prefix_suffix_attention"]
WIDE = 2**40
RANDOM_SHAPES = int(os.environ.get("TRITON_RANDOM_SHAPES", "20"))
TILES = [st.tuples(st.sampled_from((16, 32)), st.sampled_from((16, 32))) for _ in range(3)]
"""(rows, keys) of the forward, dQ and dK/dV kernels."""


def check_poisoned(spec: OpSpec, shape: TwoStreamShape | PrefixSuffixShape, dtype: torch.dtype) -> None:
    """The error budget, every element being written."""
    with poisoned():
        check(spec, spec.make_case(shape, dtype), dtype, backend="triton")


@pytest.mark.parametrize("size", [1, 8, 24, 64, 80, 128])
def test_head_sizes(size: int) -> None:
    check_poisoned(TWO, TwoStreamShape(19, 6, size=size, batch=1, heads=1), torch.float32)
    if size in (1, 24, 128):
        rule = PrefixSuffixShape(19, 13, 11, cut=2, shift="random", batch=1, heads=1, size=size)
        check_poisoned(ONE, rule, torch.float32)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (TWO, TwoStreamShape(1025, 980, 1, 1, size=16, with_content=False)),
        (TWO, TwoStreamShape(2048, 2040, 1, 1, size=16, with_content=False)),
        *(
            (ONE, PrefixSuffixShape(*counts, cut=5, shift="random", batch=1, heads=1, size=16))
            for counts in ((1025, 20, 13), (13, 1025, 20), (20, 13, 1025))
        ),
    ],
    ids=lambda x: x.name if isinstance(x, OpSpec) else "",
)
def test_long_sequences(spec: OpSpec, shape) -> None:
    """512-pixel images and beyond in the last block, and rules; the tiles of the launch table."""
    check_poisoned(spec, shape, torch.float16)


def check_random(monkeypatch_tiles: tuple, spec: OpSpec, case: Case) -> None:
    """The error budget in float64: with few keys plain torch's own, the budget, is a matter of luck in fewer digits."""
    with pytest.MonkeyPatch.context() as monkeypatch, poisoned():
        set_tiles(monkeypatch, *monkeypatch_tiles)
        check(spec, case, torch.float64, backend="triton")


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
@given(shape=shapes(), tiles=st.tuples(*TILES), seed=st.integers(0, 2**16))
def test_random_shapes(shape: TwoStreamShape, tiles: tuple, seed: int) -> None:
    """Shapes, options and tiles at random, so that tiles end anywhere."""
    check_random(tiles, TWO, TWO.make_case(shape, torch.float64, seed=seed))


def make_rule(
    shift: Tensor,
    cut: int | Tensor,
    content: int,
    suffix: int,
    *,
    batch: int = 1,
    heads: int = 1,
    size: int = 16,
    seed: int = 0,
) -> Case:
    """Random q, k and v in float64 under a rule; `batch` counts where the rule has none."""
    generator = torch.Generator().manual_seed(seed)
    batch = shift.shape[0] if shift.dim() == 2 else len(cut) if isinstance(cut, Tensor) else batch
    q, k, v = (
        torch.randn(batch, n, heads, size, generator=generator, dtype=torch.float64)
        for n in (shift.shape[-1], content + suffix, content + suffix)
    )
    return Case({"q": q, "k": k, "v": v}, {"shift": shift, "cut": cut, "suffix_keys": suffix})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to 40 rows and 80 keys, mostly up to 16 and 32 (the interpreter is slow); rules of all kinds."""
    count = st.one_of(*[st.integers(0, 16)] * 19, st.integers(17, 40))
    rows, content, suffix = draw(count), draw(count), draw(count)
    rows, content = max(rows, 1), max(content, 1 - suffix)
    batch, heads = draw(st.sampled_from(((1, 1), (1, 1), (1, 2), (2, 1))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    reach = draw(st.sampled_from((0, content + suffix + 3, WIDE)))
    shift = torch.randint(-reach, reach + 1, (batch, rows), generator=generator)
    if draw(st.booleans()):
        shift = shift.sort(dim=1).values
    if draw(st.booleans()):
        shift = shift[0]
    one_cut = st.one_of(st.integers(-3, content + 3), st.sampled_from((-WIDE, WIDE)))
    cut = draw(st.one_of(one_cut, st.lists(one_cut, min_size=batch, max_size=batch).map(torch.tensor)))
    size, seed = draw(st.sampled_from((8, 16, 24))), generator.initial_seed()
    return make_rule(shift, cut, content, suffix, batch=batch, heads=heads, size=size, seed=seed)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(case=cases(), tiles=st.tuples(*TILES))
def test_random_rules(case: Case, tiles: tuple) -> None:
    """Shapes, shifts, cuts and tiles at random: blind rows, keys that nobody sees, runs without keys."""
    check_random(tiles, ONE, case)


RULES = {
    "causal": (causal_shifts(70), 0, 70, 0),
    "bidirectional": (bidirectional_shifts(70), 41, 41, 30),
    "two_streams_in_one": (torch.cat(two_stream_shifts(40, 12)), 12, 40, 28),
    "no_content_key_seen": (torch.arange(-70, 0), 0, 33, 20),
    "no_suffix_key_seen": (torch.arange(70) + 20, 3, 33, 20),
    "nothing_seen": (torch.full((70,), -5), 5, 33, 0),
    "no_content_keys": (torch.arange(70) - 30, 3, 0, 33),
    "any_order": (torch.arange(70) * 37 % 71 - 20, 3, 33, 20),
    "far": (torch.tensor([-WIDE, -40, 0, 40, WIDE] * 14), 3, 33, 20),
    "cut_per_image": (torch.arange(70) - 30, torch.tensor([20, -WIDE]), 33, 20),
    "shift_per_image": (torch.stack([torch.arange(70) - 60, 60 - torch.arange(70)]), 5, 33, 20),
    "both_per_image": (torch.stack([torch.arange(70) - 60, 60 - torch.arange(70)]), torch.tensor([0, 33]), 33, 20),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Rules of all kinds over several tiles of rows and keys."""
    check_random(((32, 16), (16, 32), (32, 16)), ONE, make_rule(*RULES[name]))


def test_gradcheck_of_a_rule_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, (32, 16), (16, 32), (16, 16))
    shift, cut, content, suffix = RULES["both_per_image"]
    check_gradients(ONE, make_rule(shift[..., 23:42], cut, content, suffix, size=4), backend="triton")


def both(test: Callable) -> Callable:
    """The test with a small case of each op."""
    cases = {
        "two_stream": (TWO, TWO.make_case(TwoStreamShape(19, 6, heads=1, size=16), torch.float64)),
        "prefix_suffix": (ONE, make_rule(torch.arange(19) - 4, 2, 13, 11)),
    }
    return pytest.mark.parametrize(("spec", "case"), cases.values(), ids=cases)(test)


@both
def test_rows_that_start_anywhere_and_strides_of_the_last_dimension(spec: OpSpec, case: Case) -> None:
    """Unaligned rows, and a last dimension that is not contiguous, give the bits of a plain tensor."""
    inputs = {name: x.half() for name, x in case.inputs.items()}
    expected = spec.function(**inputs, **case.options, backend="triton")
    odd = {name: off_by_one(x) for name, x in inputs.items()}
    assert not any(rows_are_aligned(x) for x in odd.values()) and all(rows_are_aligned(x) for x in inputs.values())
    for other in (odd, {name: turned(x) for name, x in inputs.items()}):
        assert_same_bits(spec.function(**other, **case.options, backend="triton"), expected)


@both
@pytest.mark.parametrize("scale", [0.03, 0.7, 3.0])
def test_scales_and_large_scores(spec: OpSpec, case: Case, scale: float) -> None:
    """Any factor of the scores; scores so large that only differences to the maximum can be exponentiated."""
    large = Case(case.inputs | {"k": case.inputs["k"] * 150}, case.options)
    reference, actual = (
        outputs_and_gradients(
            spec.function, with_inputs(large, torch.float64), case.options, scale=scale, backend=backend
        )
        for backend in ("reference", "triton")
    )
    torch.testing.assert_close(actual[0], reference[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(actual[1], reference[1], rtol=1e-9, atol=1e-9)


@both
def test_results_repeat_bit_for_bit(spec: OpSpec, case: Case) -> None:
    assert_same_bits(*(run(spec, case, torch.float16, backend="triton") for _ in range(2)))


@both
def test_what_cannot_run_is_refused(spec: OpSpec, case: Case) -> None:
    half = {name: x.bfloat16() for name, x in case.inputs.items()}
    with pytest.raises(ValueError, match=r"cannot run here: TRITON_INTERPRET=1 computes bfloat16 wrongly; use float16"):
        spec.function(**half, **case.options, backend="triton")
    single = {name: x.float() for name, x in case.inputs.items()}
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="computes bfloat16 wrongly"):
        spec.function(**single, **case.options, backend="triton")
    wide = {name: torch.zeros(*x.shape[:3], 129) for name, x in case.inputs.items()}
    with pytest.raises(ValueError, match="head sizes 1 to 128, got 129"):
        spec.function(**wide, **case.options, backend="triton")
    with pytest.raises(ValueError, match="takes CPU tensors, not cuda"):
        choose_backend("triton", "cuda", torch.float16, ("triton",))
    assert choose_backend("auto", "cpu", torch.float32, ("reference", "sdpa", "triton")) == "sdpa"


@pytest.mark.parametrize("with_content", [True, False])
def test_what_padding_rows_hold_reaches_no_result(with_content: bool) -> None:
    """With one cut per image: NaN in every row of targets that do not exist gives the bits of zeros there."""
    shape = TwoStreamShape(6, (1, 4), heads=1, with_content=with_content)
    case = TWO.make_case(shape, torch.float32)
    results = []
    for filling in (0.0, float("nan")):
        inputs = with_inputs(case, torch.float32)
        with torch.no_grad():
            for name, x in inputs.items():
                real = 6 - 4 if name == "q_query" else 6 + 6 - 4
                x[1, real:] = filling
        outputs, gradients = outputs_and_gradients(TWO.function, inputs, case.options, backend="triton")
        results.append([*outputs, *gradients.values()])
    assert_same_bits(*results)
    assert all(x.isfinite().all() for x in results[1])


@pytest.mark.parametrize("mask_tokens", [True, False])
def test_wrong_numbers_move_no_access_out_of_a_tensor(mask_tokens: bool) -> None:
    """Garbage for permutations and cuts: NaN around every tensor reaches no result, and no store lands on it."""
    batch, tokens, targets, heads, size = 2, 19, 12, 2, 16
    fences = Fences()
    content = tokens + targets if mask_tokens else tokens
    q, out, d_out, dq = (Streams(*(fences.fenced(batch, n, heads, size) for n in (content, targets))) for _ in range(4))
    k, v, dk, dv = (fences.fenced(batch, content, heads, size) for _ in range(4))
    lse = Streams(*(fences.fenced(batch, n, heads) for n in (content, targets)))
    perm = torch.randint(-(2**40), 2**40, (batch, tokens), generator=fences.generator)
    for cuts in (torch.tensor([-5, 2**40]), torch.tensor([3, tokens + 7])):
        problem = Problem(tokens, targets, cuts, mask_tokens, 0.25)
        triton_backend.forward(q, k, v, out, lse, problem, perm)
        triton_backend.backward(d_out, q, k, v, out, lse, dq, dk, dv, problem, perm)
        fences.assert_whole()


@pytest.mark.parametrize("with_content", [True, False])
@pytest.mark.parametrize("mask_tokens", [True, False])
def test_packed_layout(mask_tokens: bool, with_content: bool) -> None:
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


def test_rows_that_see_nothing() -> None:
    """Output 0, log-sum-exp -inf, gradients 0, beside rows that see something; whatever they hold."""
    shift = torch.tensor([-9, 4, -9, 30, 2])
    case = make_rule(shift, 0, 7, 5)
    inputs = with_inputs(case, torch.float64)
    blind = torch.tensor([0, 2])
    with torch.no_grad():
        inputs["q"][:, blind] = float("nan")
    arguments = (*inputs.values(), shift, 0, None, 0, 0.25)
    out, lse = op.prefix_suffix_attention_op(*arguments, "triton")
    dq, dk, dv = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert out[:, blind].abs().max() == dq[:, blind].abs().max() == 0
    assert lse[:, blind].isneginf().all() and lse[:, [1, 3, 4]].isfinite().all()
    seeing = [1, 3, 4]
    rest = {"q": inputs["q"].detach()[:, seeing].requires_grad_(), "k": inputs["k"], "v": inputs["v"]}
    expected = prefix_suffix_attention(*rest.values(), shift[seeing], 0, scale=0.25, backend="reference")
    torch.testing.assert_close(out[:, seeing], expected)
    expected_gradients = torch.autograd.grad(expected.sum(), list(rest.values()))
    for actual, reference in zip((dq[:, seeing], dk, dv), expected_gradients, strict=True):
        torch.testing.assert_close(actual, reference)


def test_without_keys_or_rows() -> None:
    """Nothing to see is output 0; no rows is gradient 0."""
    q, k = torch.randn(1, 5, 1, 16, requires_grad=True), torch.randn(1, 7, 1, 16, requires_grad=True)
    out = prefix_suffix_attention(q, k[:, :0], k[:, :0], torch.arange(5), backend="triton")
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert out.shape == q.shape and out.abs().max() == dq.abs().max() == 0
    out = prefix_suffix_attention(q[:, :0], k, k, torch.arange(0), backend="triton")
    (dk,) = torch.autograd.grad(out.sum(), k)
    assert out.numel() == 0 and dk.abs().max() == 0


@pytest.mark.parametrize("name", ["causal", "two_streams_in_one", "any_order", "both_per_image", "no_content_key_seen"])
def test_each_key_tile_lists_the_row_tiles_that_see_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Row tiles whose rows all see all of a key tile stand first, others that see some of it last, no others.

    But those with a row that sees no key at all, which stand apart.
    """
    tile_rows, tile_keys = 32, 16
    set_tiles(monkeypatch, (32, 16), (32, 16), (tile_rows, tile_keys))
    shift, cut, content, suffix = RULES[name]
    case = make_rule(*RULES[name])
    q, k, v = case.inputs.values()
    lse, problem = q.new_empty(q.shape[:3]), prefix_suffix.Problem(shift, cut, suffix, 0.25)
    _, row_tile_list, _ = prefix_suffix_backend.backward_launches(q, q, k, v, q, lse, q, k, v, problem, launch.OLDEST)
    row_tile_list.run(q.device)
    lists = row_tile_list.arguments[2]
    visible = prefix_suffix_mask(shift, cut, content, suffix)
    visible = visible if visible.dim() == 3 else visible.unsqueeze(0)
    assert lists.shape[0] == visible.shape[0]
    for image, mask in enumerate(visible):
        for tile, keys in enumerate(mask.split(tile_keys, dim=1)):
            parts = keys.split(tile_rows)
            whole = [i for i, part in enumerate(parts) if part.all() and len(part) == tile_rows]
            blind = [i for i, rows in enumerate(mask.split(tile_rows)) if parts[i].any() and not rows.any(1).all()]
            some = [i for i, part in enumerate(parts) if part.any() and i not in (*whole, *blind)]
            *entries, plain, masked, apart = lists[image, tile].tolist()
            ends = entries[:plain], entries[len(parts) - masked : len(parts)][::-1], entries[len(parts) :][:apart]
            assert ends == (whole, some, blind)


def test_half_of_the_row_tiles_are_skipped_where_the_rule_is_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, (16, 16), (16, 16), (16, 16))
    rows = 512
    q = torch.empty(1, rows, 1, 16)
    _, row_tile_list, _ = prefix_suffix_backend.backward_launches(
        *(q, q, q, q, q, q[..., 0], q, q, q, prefix_suffix.Problem(causal_shifts(rows), 0, 0, 1.0), launch.OLDEST)
    )
    row_tile_list.run(q.device)
    tile_pairs = (rows // 16) ** 2
    visited = row_tile_list.arguments[2][..., -3:].sum().item()
    assert tile_pairs / 2 <= visited <= tile_pairs / 2 + rows // 16


@pytest.mark.parametrize("name", ["causal", "no_content_key_seen", "no_suffix_key_seen"])
def test_keys_that_no_row_of_a_tile_sees_are_not_read(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With the first 16 rows alone in a tile: NaN in all keys that they do not see changes neither output nor dQ."""
    set_tiles(monkeypatch, (16, 16), (16, 16), (16, 16))
    shift, cut, content, suffix = RULES[name]
    shift = shift[:16]
    case = make_rule(shift, cut, content, suffix)
    unseen = ~prefix_suffix_mask(shift, cut, content, suffix).any(dim=0)
    assert unseen.any()
    results = []
    for filling in (0.0, float("nan")):
        inputs = with_inputs(case, torch.float64)
        with torch.no_grad():
            inputs["k"][:, unseen], inputs["v"][:, unseen] = filling, filling
        (out,), gradients = outputs_and_gradients(ONE.function, inputs, case.options, backend="triton")
        results.append([out, gradients["q"], gradients["k"][:, ~unseen], gradients["v"][:, ~unseen]])
    assert_same_bits(*results)
    assert all(x.isfinite().all() for x in results[0])


def test_no_mask_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_):
        raise AssertionError("a mask of rows x keys was asked for")

    monkeypatch.setattr(op, "prefix_suffix_mask", refuse)
    case = ONE.make_case(ONE.shapes["per_image"], torch.float32)
    run(ONE, case, torch.float32, backend="triton")
    with pytest.raises(AssertionError, match="rows x keys"):
        prefix_suffix_attention(**case.inputs, **case.options, backend="reference")


def test_shifts_with_any_strides_and_of_any_integers() -> None:
    shape = PrefixSuffixShape(19, 13, 11, cut=2, shift="random", per_image=True, size=16)
    case = ONE.make_case(shape, torch.float16)
    shift = case.options["shift"]

    def attend(other: Tensor) -> Tensor:
        return prefix_suffix_attention(**case.inputs, **case.options | {"shift": other}, backend="triton")

    for other in (shift.t().contiguous().t(), torch.stack([shift, -shift], dim=-1)[..., 0], shift.to(torch.int16)):
        assert torch.equal(attend(other), attend(shift))
    one = shift[0].expand_as(shift)  # the same shifts for all images, without memory for each
    assert torch.equal(attend(one), attend(shift[0]))


def test_autocast_runs_in_the_dtype_of_the_region() -> None:
    case = ONE.make_case(ONE.shapes["blind_rows"], torch.float32)
    half = {name: x.half() for name, x in case.inputs.items()}
    with torch.autocast("cpu", torch.float16):
        actual = prefix_suffix_attention(**case.inputs, **case.options, backend="triton")
    assert torch.equal(actual, prefix_suffix_attention(**half, **case.options, backend="triton"))


def test_opcheck() -> None:
    """torch.library's own checks: schema, autograd registration, fake tensors, AOT dispatch."""
    inputs = with_inputs(make_rule(torch.arange(5) - 1, 2, 4, 3), torch.float32)
    for cuts in (None, torch.tensor([1])):
        arguments = (*inputs.values(), torch.arange(5) - 1, 2, cuts, 3, 0.25, "triton")
        torch.library.opcheck(op.prefix_suffix_attention_op, arguments)
