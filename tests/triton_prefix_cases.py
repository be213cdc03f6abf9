"""The Triton kernels of prefix_suffix_attention in Triton's interpreter; test_triton_interpreter.py runs this file.

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
from torch import Tensor
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

from mapet_kernels import launch
from mapet_kernels.attention_launch import rows_are_aligned
from mapet_kernels.prefix_suffix_attention import op, prefix_suffix_attention, triton_backend
from mapet_kernels.prefix_suffix_attention.problem import Problem
from mapet_kernels.registry import REGISTRY, Case, PrefixSuffixShape
from mapet_kernels.visibility import bidirectional_shifts, causal_shifts, prefix_suffix_mask, two_stream_shifts

SPEC = REGISTRY["prefix_suffix_attention"]
SMALL = [name for name, shape in SPEC.shapes.items() if shape.rows < 97]
WIDE = 2**40
RANDOM_SHAPES = int(os.environ.get("TRITON_RANDOM_SHAPES", "15"))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty fills with NaN."""
    with poison(monkeypatch):
        yield


def make_case(
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


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float16) for name in SPEC.shapes] + [(name, torch.float32) for name in SMALL],
    ids=str,
)
def test_error_budget(poisoned: None, name: str, dtype: torch.dtype) -> None:
    """The registry's shapes with the tiles of the launch table; large shapes in fp16, as its tiles are larger."""
    check_error_budget(SPEC, SPEC.make_case(SPEC.shapes[name], dtype), dtype)


@pytest.mark.parametrize("size", [1, 24, 128])
def test_head_sizes(poisoned: None, size: int) -> None:
    shape = PrefixSuffixShape(19, 13, 11, cut=2, shift="random", batch=1, size=size)
    check_error_budget(SPEC, SPEC.make_case(shape, torch.float32), torch.float32)


@pytest.mark.parametrize(("rows", "content", "suffix"), [(2048, 20, 13), (13, 2048, 20), (20, 13, 2048)])
def test_long_sequences(poisoned: None, rows: int, content: int, suffix: int) -> None:
    shape = PrefixSuffixShape(rows, content, suffix, cut=5, shift="random", batch=1, heads=1, size=16)
    check_error_budget(SPEC, SPEC.make_case(shape, torch.float16), torch.float16)


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
    return make_case(shift, cut, content, suffix, batch=batch, heads=heads, size=size, seed=seed)


@settings(max_examples=RANDOM_SHAPES, deadline=None, derandomize=True, database=None)
@given(case=cases(), forward=tiles(), dq=tiles(), dkv=tiles())
def test_random_shapes(case: Case, forward: tuple[int, int], dq: tuple[int, int], dkv: tuple[int, int]) -> None:
    """Shapes, shifts, cuts and tiles at random: blind rows, keys that nobody sees, runs without keys."""
    check_random(SPEC, case, forward, dq, dkv)


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
def test_rules(poisoned: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Rules of all kinds over several tiles of rows and keys."""
    set_tiles(monkeypatch, (32, 16), (16, 32), (32, 16))
    check_error_budget(SPEC, make_case(*RULES[name]), torch.float64)


def test_rows_that_see_nothing() -> None:
    """Output 0, log-sum-exp -inf, gradients 0, beside rows that see something; whatever they hold."""
    shift = torch.tensor([-9, 4, -9, 30, 2])
    case = make_case(shift, 0, 7, 5)
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


def test_without_keys_or_rows(poisoned: None) -> None:
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
    case = make_case(*RULES[name])
    q, k, v = case.inputs.values()
    lse, problem = q.new_empty(q.shape[:3]), Problem(shift, cut, suffix, 0.25)
    _, row_tile_list, _ = triton_backend.backward_launches(q, q, k, v, q, lse, q, k, v, problem, launch.OLDEST)
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
    _, row_tile_list, _ = triton_backend.backward_launches(
        *(q, q, q, q, q, q[..., 0], q, q, q, Problem(causal_shifts(rows), 0, 0, 1.0), launch.OLDEST)
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
    case = make_case(shift, cut, content, suffix)
    unseen = ~prefix_suffix_mask(shift, cut, content, suffix).any(dim=0)
    assert unseen.any()
    results = []
    for filling in (0.0, float("nan")):
        inputs = with_inputs(case, torch.float64)
        with torch.no_grad():
            inputs["k"][:, unseen], inputs["v"][:, unseen] = filling, filling
        (out,), gradients = outputs_and_gradients(SPEC.function, inputs, case.options, backend="triton")
        results.append([out, gradients["q"], gradients["k"][:, ~unseen], gradients["v"][:, ~unseen]])
    assert_same_bits(*results)
    assert all(x.isfinite().all() for x in results[0])


def test_no_mask_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_):
        raise AssertionError("a mask of rows x keys was asked for")

    monkeypatch.setattr(op, "prefix_suffix_mask", refuse)
    case = SPEC.make_case(SPEC.shapes["per_image"], torch.float32)
    run(SPEC, case, torch.float32)
    with pytest.raises(AssertionError, match="rows x keys"):
        prefix_suffix_attention(**case.inputs, **case.options, backend="reference")


@pytest.mark.parametrize("name", ["any_order", "both_per_image"])
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    set_tiles(monkeypatch, (32, 16), (16, 32), (16, 16))
    shift, cut, content, suffix = RULES[name]
    check_gradients(SPEC, make_case(shift[..., 23:42], cut, content, suffix, size=4))


@pytest.mark.parametrize("name", SMALL)
def test_strided_inputs_with_poisoned_gaps(poisoned: None, name: str) -> None:
    """Views into buffers whose other half is NaN give the bits of contiguous inputs."""
    case = SPEC.make_case(SPEC.shapes[name], torch.float32)
    assert_same_bits(run(SPEC, case, torch.float32, strided=True), run(SPEC, case, torch.float32))


def test_rows_that_start_anywhere_and_any_strides() -> None:
    """Unaligned rows, a last dimension that is not contiguous, and strided shifts give the bits of plain tensors."""
    case = SPEC.make_case(PrefixSuffixShape(19, 13, 11, cut=2, shift="random", per_image=True, size=16), torch.float16)
    shift = case.options["shift"]
    expected = prefix_suffix_attention(**case.inputs, **case.options, backend="triton")
    odd = unaligned(case.inputs)
    assert not any(rows_are_aligned(x) for x in odd.values())
    for inputs in (odd, turned(case.inputs)):
        assert torch.equal(prefix_suffix_attention(**inputs, **case.options, backend="triton"), expected)
    for other in (shift.t().contiguous().t(), torch.stack([shift, -shift], dim=-1)[..., 0], shift.to(torch.int16)):
        options = case.options | {"shift": other}
        assert torch.equal(prefix_suffix_attention(**case.inputs, **options, backend="triton"), expected)
    one = shift[0].expand_as(shift)  # the same shifts for all images, without memory for each
    options = case.options | {"shift": one}, case.options | {"shift": shift[0]}
    assert_same_bits(*([prefix_suffix_attention(**case.inputs, **o, backend="triton")] for o in options))


@pytest.mark.parametrize("scale", [0.03, 0.7, 3.0])
def test_scales_and_large_scores(scale: float) -> None:
    """Any factor of the scores; scores so large that only differences to the maximum can be exponentiated."""
    case = make_case(torch.arange(19) - 4, 2, 13, 11)
    case.inputs["k"].mul_(100)
    results = []
    for backend in ("reference", "triton"):
        inputs = with_inputs(case, torch.float64)
        (out,), gradients = outputs_and_gradients(SPEC.function, inputs, case.options, scale=scale, backend=backend)
        results.append([out, *gradients.values()])
    for reference, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-9, atol=1e-9)


def test_results_repeat_bit_for_bit() -> None:
    case = SPEC.make_case(SPEC.shapes["per_image"], torch.float16)
    assert_same_bits(run(SPEC, case, torch.float16), run(SPEC, case, torch.float16))


def test_compiles_without_graph_break() -> None:
    case = SPEC.make_case(SPEC.shapes["blind_rows"], torch.float32)
    compiled = torch.compile(SPEC.function, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(SPEC, case, torch.float32, function=compiled), run(SPEC, case, torch.float32))


def test_autocast_runs_in_the_dtype_of_the_region() -> None:
    case = SPEC.make_case(SPEC.shapes["blind_rows"], torch.float32)
    half = {name: x.half() for name, x in case.inputs.items()}
    with torch.autocast("cpu", torch.float16):
        actual = prefix_suffix_attention(**case.inputs, **case.options, backend="triton")
    assert torch.equal(actual, prefix_suffix_attention(**half, **case.options, backend="triton"))


def test_opcheck() -> None:
    """torch.library's own checks: schema, autograd registration, fake tensors, AOT dispatch."""
    inputs = with_inputs(make_case(torch.arange(5) - 1, 2, 4, 3), torch.float32)
    for cuts in (None, torch.tensor([1])):
        arguments = (*inputs.values(), torch.arange(5) - 1, 2, cuts, 3, 0.25, "triton")
        torch.library.opcheck(op.prefix_suffix_attention_op, arguments)


def test_what_cannot_run_is_refused() -> None:
    case = SPEC.make_case(SPEC.shapes["blind_rows"], torch.float32)
    half = {name: x.bfloat16() for name, x in case.inputs.items()}
    with pytest.raises(ValueError, match=r"cannot run here: TRITON_INTERPRET=1 computes bfloat16 wrongly; use float16"):
        prefix_suffix_attention(**half, **case.options, backend="triton")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="bfloat16 wrongly"):
        prefix_suffix_attention(**case.inputs, **case.options, backend="triton")
    wide = SPEC.make_case(PrefixSuffixShape(3, 3, size=129), torch.float32)
    with pytest.raises(ValueError, match="head sizes 1 to 128, got 129"):
        prefix_suffix_attention(**wide.inputs, **wide.options, backend="triton")
    with pytest.raises(ValueError, match=r"unknown backend 'flash'; backends are auto, reference, sdpa, triton"):
        prefix_suffix_attention(**case.inputs, **case.options, backend="flash")
