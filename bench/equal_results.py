"""Are results right? Against plain torch in float64, with the table of tolerances that the tests use too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.attention_ways import Operands
from mapet_kernels.registry import REGISTRY, TwoStreamShape
from mapet_kernels.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, budget

RESULTS = ("out_content", "out_query", "dq_content", "dq_query", "dk", "dv")
"""What a forward and backward pass gives, in this order: two outputs, four gradients."""

CHUNK_BYTES = {"cuda": 8 << 30, "cpu": 256 << 20}


@dataclass(frozen=True)
class Yardstick:
    """Float64 results in the order of RESULTS, and the error each is allowed to have."""

    exact: tuple[Tensor, ...]
    allowed: tuple[float, ...]

    def errors(self, results: Sequence[Tensor]) -> dict[str, float]:
        """Largest error of each result in units of what is allowed: at most 1 is right; infinite where not finite."""
        shares = {}
        for name, result, exact, allowed in zip(RESULTS, results, self.exact, self.allowed, strict=True):
            if result.shape != exact.shape:
                raise ValueError(f"{name} has shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
            error = (result.double() - exact).abs().max().item()
            shares[name] = error / allowed if error == error else float("inf")
        return shares


def yardstick(operands: Operands) -> Yardstick:
    """Plain torch over all images, some at a time, in float64 and in the operands' dtype.

    What is allowed is the tolerance table's: a factor times the largest error of plain torch in the same dtype, or the
    floor relative to the largest value.
    """
    per_chunk = images_per_chunk(operands.shape, CHUNK_BYTES[operands.k.device.type])
    exact_parts, allowed = [], [0.0] * len(RESULTS)
    for start in range(0, operands.shape.batch, per_chunk):
        part = slice(start, start + per_chunk)
        exact, plain = (_plain(operands, part, work) for work in (torch.float64, operands.k.dtype))
        factors = (FORWARD_FACTOR,) * 2 + (GRADIENT_FACTOR,) * 4
        allowed = [max(a, budget(p, e, f)) for a, p, e, f in zip(allowed, plain, exact, factors, strict=True)]
        exact_parts.append(exact)
    return Yardstick(tuple(torch.cat(parts) for parts in zip(*exact_parts, strict=True)), tuple(allowed))


def images_per_chunk(shape: TwoStreamShape, limit: int) -> int:
    """Images whose dense float64 scores, of which autograd holds about six copies, take at most `limit` bytes."""
    keys = shape.tokens + shape.targets
    return max(1, limit // (6 * 8 * shape.heads * (keys + shape.targets) * keys))


def _plain(operands: Operands, part: slice, dtype: torch.dtype) -> tuple[Tensor, ...]:
    names = ("q_content", "q_query", "k", "v")
    leaves = q_content, q_query, k, v = [getattr(operands, name)[part].to(dtype).requires_grad_() for name in names]
    outputs = REGISTRY["two_stream_attention"].plain(q_query, k, v, operands.shape.cuts, q_content=q_content)
    upstream = [x[part].to(dtype) for x in (operands.d_content, operands.d_query)]
    return (*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, upstream))
