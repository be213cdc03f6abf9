"""Ways to attend give one result, whatever their layout; what they cost, and the shapes that they are measured on."""

from __future__ import annotations

import pytest
import torch

from bench import attention, attention_ways, equal_results, roofline
from bench.attention_ways import FlexSetting, Unavailable, Way, flex, random_operands
from bench.options import Options
from mapet_kernels.registry import TwoStreamShape
from mapet_kernels.visibility import two_stream_visibility

CPU = torch.device("cpu")
SHAPE = TwoStreamShape(13, 4, batch=3, heads=2, size=16)


@pytest.mark.parametrize("name", ["ours_sdpa", "ours_reference", "sdpa_mask", "official", "official_with_masks"])
def test_ways_give_the_results_of_the_reference(name: str) -> None:
    """Also the gradients that are timed, in the way's own layout, are those of the operands brought into it."""
    operands = random_operands(SHAPE, torch.float32, CPU)
    way = attention_ways.builders()[name](operands)
    assert max(equal_results.yardstick(operands).errors(way.results()).values()) <= 1
    timed = way.backward(way.forward())
    leaves = [x.detach().requires_grad_() for x in operands.inputs]
    arranged = way.arrange(*leaves)
    for gradient, leaf in zip(torch.autograd.grad(arranged, leaves, timed), way.results()[2:], strict=True):
        torch.testing.assert_close(gradient, leaf, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("one_call", [True, False])
def test_flex_attention_has_the_same_outputs(one_call: bool) -> None:
    """Not compiled: compiled it has no backward pass on a CPU. On a GPU the suite checks its gradients too."""
    operands = random_operands(SHAPE, torch.float32, CPU)
    way = flex(FlexSetting(one_call, compiled=False), operands)
    with torch.no_grad():
        outputs = way.restore(*way.attend(*(x.detach() for x in way.leaves)))
    for actual, exact in zip(outputs, equal_results.yardstick(operands).exact[:2], strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(Unavailable, match="no backward pass on a CPU"):
        flex(FlexSetting(one_call), operands)


def test_the_yardstick_is_the_same_in_chunks(monkeypatch) -> None:
    operands = random_operands(SHAPE, torch.float16, CPU)
    whole = equal_results.yardstick(operands)
    monkeypatch.setitem(equal_results.CHUNK_BYTES, "cpu", 1)
    assert equal_results.images_per_chunk(SHAPE, 1) == 1
    chunked = equal_results.yardstick(operands)
    for a, b in zip(whole.exact, chunked.exact, strict=True):
        torch.testing.assert_close(a, b)
    assert whole.allowed == pytest.approx(chunked.allowed, rel=1e-3)


@pytest.mark.parametrize("shape", [SHAPE, TwoStreamShape(17, 16, 1, 3, 8), TwoStreamShape(9, 1, 2, 1, 4)])
def test_costs_equal_what_masks_and_tensors_count(shape: TwoStreamShape) -> None:
    pairs = sum(int(mask.sum()) for mask in two_stream_visibility(shape.tokens, shape.cuts))
    pairs *= shape.batch * shape.heads
    operands = random_operands(shape, torch.float16, CPU)
    q, kv = (sum(x.numel() * x.element_size() for x in part) for part in (operands.inputs[:2], operands.inputs[2:]))
    lse = 4 * (operands.q_content.shape[1] + operands.q_query.shape[1]) * shape.batch * shape.heads
    costs = roofline.costs(shape, torch.float16)
    assert costs["forward"] == roofline.Cost(4 * pairs * shape.size, q + kv + q)
    assert costs["backward"].flop == 10 * pairs * shape.size
    assert costs["backward"].bytes == (q + q + q + kv + lse) + (q + kv)  # q, out, d_out, k, v, lse; then dq, dk, dv
    assert costs["both"].bytes == costs["forward"].bytes + costs["backward"].bytes
    assert costs["both"].seconds(roofline.Rates(1e9, {"fp16": 1e30}), "fp16") == costs["both"].bytes / 1e9
    assert costs["both"].seconds(roofline.Rates(1e30, {"fp16": 1e9}), "fp16") == costs["both"].flop / 1e9


def test_the_targets_are_measured() -> None:
    made = attention.contests(Options(preset="targets"), CPU)
    first = made[0].sizes
    assert (first["tokens"], first["cuts"], first["batch"] * first["heads"], first["size"]) == (197, 50, 3072, 64)
    assert {c.sizes["tokens"] for c in made} == {50, 197, 344, 785, 1025}
    rows = [c.sizes["batch"] * c.sizes["heads"] * c.sizes["tokens"] for c in made]
    assert all(abs(count / (3072 * 197) - 1) < 0.02 for count in rows)
    cuts = sorted(c.sizes["cuts"] / 197 for c in made if c.sizes["label"].startswith("cut"))
    assert cuts[0] == pytest.approx(0.1, abs=0.003) and cuts[-1] == pytest.approx(0.9, abs=0.003)
    assert {c.sizes["heads"] for c in made} == {3, 6, 12} and len({c.name for c in made}) == len(made) == 12
    (tuned,) = attention.contests(Options(preset="tuned_flex"), CPU)
    assert {"flex_one_call_128_autotuned", "flex_two_calls_128_autotuned"} < set(tuned.ways)
    for contest in (tuned, *made):
        assert set(contest.ways) <= set(attention_ways.builders()) and contest.base in contest.ways


def test_what_is_saved_is_counted_beyond_inputs_and_outputs(monkeypatch) -> None:
    """With an allocator that is told what to say."""
    allocated = iter([1000, 1900])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: next(allocated))
    way = Way(None, None, lambda: (torch.zeros(100),), None)
    way.leaves = ()
    assert attention.saved(way, torch.device("cuda")) == {"saved_bytes": 500}
    assert attention.saved(way, CPU) == {}
