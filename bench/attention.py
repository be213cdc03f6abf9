"""Two-stream attention, forward and backward, beside what users would take instead: time, rates, roofline, memory.

The peers: the official code's way, scaled_dot_product_attention with a boolean mask, xformers, and FlexAttention. Every
way is checked against float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

import torch

from bench import options, roofline
from bench.attention_ways import FLEX_SETTINGS, OURS, Way, builders, own_backends, random_operands
from bench.contest import Arena, Contest, Entrant, two_passes
from bench.equal_results import yardstick
from bench.options import DTYPES, PAPER_CUT, PAPER_TOKENS
from mapet_kernels.backends import TWO_STREAM_BACKENDS, choose_backend
from mapet_kernels.registry import TwoStreamShape

PAIRS, SIZE, HEADS = 3072, 64, 12
"""Images x heads, head size and heads of the project's targets."""
LENGTHS = (1025, 50, 785, 344)
CUT_SHARES = (0.1, 0.9, 0.5, 0.7, 0.3)
OTHER_HEADS = (3, 6)


def contests(chosen: options.Options, device: torch.device) -> list[Contest]:
    """The shapes of the steps asked for, or those of the targets, the most important ones first."""
    if chosen.preset != "step":
        tuned = chosen.preset == "tuned_flex"
        shapes = {"target": target()} if tuned else targets()
        return [
            contest(label, shape, dtype, device, tuned) for dtype in chosen.dtype for label, shape in shapes.items()
        ]
    found = []
    for sizes in options.combinations(chosen, device):
        model = sizes.model
        shape = TwoStreamShape(model.tokens, sizes.cut, sizes.batch, model.heads, model.head_size)
        found.append(contest(f"step {sizes.model_name}", shape, sizes.dtype, device))
    return found


def targets() -> dict[str, TwoStreamShape]:
    """The rows of the project's targets by what varies."""
    return {
        "target": target(),
        **{f"tokens {tokens}": target(tokens) for tokens in LENGTHS},
        **{f"cut {share:.0%}": target(cut=round(share * PAPER_TOKENS)) for share in CUT_SHARES},
        **{f"heads {heads}": target(heads=heads) for heads in OTHER_HEADS},
    }


def target(tokens: int = PAPER_TOKENS, cut: int | None = None, heads: int = HEADS) -> TwoStreamShape:
    """The target's shape, or one beside it with equally many tokens in all, so that as many rows are at work."""
    batch = max(1, round(PAIRS * PAPER_TOKENS / (tokens * heads)))
    return TwoStreamShape(tokens, cut or round(tokens * PAPER_CUT / PAPER_TOKENS), batch, heads, SIZE)


def contest(label: str, shape: TwoStreamShape, dtype: str, device: torch.device, tuned: bool = False) -> Contest:
    """One shape by every way; of FlexAttention the settings whose tiles are tuned, or those whose are not."""
    own = [OURS + name for name in own_backends()]
    flex = [name for name, setting in FLEX_SETTINGS.items() if setting.autotune == tuned]
    ways = (*own, *flex) if tuned else (*own, "sdpa_mask", "xformers_bias", *flex, "official", "official_with_masks")
    base = OURS + choose_backend("auto", device, DTYPES[dtype], TWO_STREAM_BACKENDS, shape.size)
    sizes = {"label": label, **asdict(shape), "targets": shape.targets}
    name = f"{label} N {shape.tokens} c {shape.cuts} B {shape.batch} H {shape.heads} {dtype}"
    phases = tuple(roofline.costs(shape, DTYPES[dtype]))
    return Contest(
        "attention", name + (" tuned" if tuned else ""), sizes, phases, ways, base, dtype,
        partial(arena, shape, DTYPES[dtype], device),
    )  # fmt: skip


@contextmanager
def arena(shape: TwoStreamShape, dtype: torch.dtype, device: torch.device) -> Iterator[Arena]:
    """Operands that all ways share, and their float64 results."""
    operands = random_operands(shape, dtype, device)

    def entrant(name: str) -> Entrant:
        way = builders()[name](operands)
        return Entrant(
            two_passes(way.forward, way.backward), way.results, lambda: way.backward(way.forward()),
            facts=partial(saved, way, device),
        )  # fmt: skip

    ways = {name: partial(entrant, name) for name in builders()}
    yield Arena(ways, yardstick(operands).errors, roofline.costs(shape, dtype))


def saved(way: Way, device: torch.device) -> dict[str, int]:
    """On a GPU the bytes that the forward pass keeps for the backward pass besides its inputs and outputs."""
    if device.type != "cuda":
        return {}
    before = torch.cuda.memory_allocated(device)
    outputs = way.forward()
    kept = torch.cuda.memory_allocated(device) - before
    return {"saved_bytes": kept - sum(o.numel() * o.element_size() for o in outputs)}
