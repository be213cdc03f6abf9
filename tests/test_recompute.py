"""Recomputation levels: the same gradients to the bit, fewer bytes kept."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from tasks import draws_for, make_task, random_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mapet.config import ModelConfig
from mapet.objectives import OBJECTIVES
from mapet.objectives import two_stream as base
from mapet.objectives.two_stream import TwoStreamTask

LEVELS = ("none", "cheap", "blocks")
SIZES = ModelConfig(image_size=24, patch_size=8, width=32, depth=3, heads=2, vocabulary=40, drop_path=0.3)
WIDE = ModelConfig(image_size=96, patch_size=16, width=192, depth=6, heads=3, vocabulary=64)
"""Deep and wide enough that the blocks' activations are nearly all that is kept."""


def gradients(task: TwoStreamTask, *, precision: torch.dtype | None = None, compiled: bool = False) -> list[Tensor]:
    function = torch.compile(task, fullgraph=True, backend="aot_eager") if compiled else task
    with nullcontext() if precision is None else torch.autocast("cpu", precision):
        loss = function(random_batch(task.config), draws_for(task), metrics=False)["loss"]
    loss.backward()
    return [p.grad for p in task.parameters()]


def kept_bytes(objective: TwoStreamTask, precision: torch.dtype | None) -> int:
    """Bytes that a forward pass keeps for the backward pass, every storage once, weights excepted."""
    own = {p.untyped_storage().data_ptr() for p in (*objective.parameters(), *objective.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if (place := x.untyped_storage().data_ptr()) not in own:
            kept[place] = x
        return x

    arguments = random_batch(objective.config), draws_for(objective)
    cast = nullcontext() if precision is None else torch.autocast("cpu", precision)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), cast:
        objective(*arguments, metrics=False)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("level", ["cheap", "blocks"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_the_same_to_the_bit(name: str, level: str) -> None:
    expected, actual = gradients(make_task(name, model=SIZES)), gradients(make_task(name, model=SIZES, recompute=level))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("level", ["cheap", "blocks"])
def test_compiled_gradients_are_the_same_to_the_bit(level: str) -> None:
    torch._dynamo.reset()
    expected, actual = (
        gradients(make_task("mapet", model=SIZES)),
        gradients(make_task("mapet", model=SIZES, recompute=level), compiled=True),
    )
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("level", ["cheap", "blocks"])
def test_gradients_are_the_same_to_the_bit_in_bf16(level: str) -> None:
    tasks = (make_task("mapet", model=SIZES, recompute=x) for x in ("none", level))
    expected, actual = (gradients(task, precision=torch.bfloat16) for task in tasks)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_cheap_keeps_at_most_two_thirds_and_blocks_less_again(name: str, precision: torch.dtype | None) -> None:
    none, cheap, blocks = (kept_bytes(make_task(name, 10, WIDE, recompute=level), precision) for level in LEVELS)
    assert cheap <= none * 2 / 3
    assert blocks <= cheap / 3


class Products(TorchDispatchMode):
    """Counts matrix products by their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen[tuple(tuple(x.shape) for x in arguments)] += 1
        return function(*arguments, **(options or {}))


def test_cheap_repeats_no_product_and_blocks_all_but_the_last() -> None:
    counts = {}
    for level in LEVELS:
        objective = make_task("mapet", model=SIZES, recompute=level)
        with Products() as products:
            objective(random_batch(SIZES), draws_for(objective), metrics=False)["loss"].backward()
        counts[level] = products.seen
    assert counts["cheap"] == counts["none"]
    repeated = counts["blocks"] - counts["none"]
    assert repeated.total() == 4 * SIZES.depth, "q, kv, proj and fc1, not fc2, whose result nobody keeps"


def test_blocks_go_through_the_network_in_parts(monkeypatch) -> None:
    """The same predictions, in the same order, and gradients up to the order of sums."""
    whole = make_task("mapet", model=SIZES).double()
    parts = make_task("mapet", model=SIZES, recompute="blocks").double()
    monkeypatch.setattr(base, "RECOMPUTED_AT_ONCE", 3)
    images, draws = random_batch(SIZES)["images"], draws_for(whole)
    permutation, keep = draws["permutation"], draws["keep"].double()
    seen = []
    parts.model.blocks[0].norm1.register_forward_hook(lambda *call: seen.append(len(call[2])))
    torch.testing.assert_close(
        parts.predictions(images, permutation, keep), whole.predictions(images, permutation, keep)
    )
    rows = parts.layout(1).rows
    assert seen == [2 * rows, 2 * rows], "as even as can be"
    for a, b in zip(gradients(parts), gradients(whole), strict=True):
        torch.testing.assert_close(a, b)
