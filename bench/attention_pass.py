"""Tensors of a pass of two-stream attention as the Triton kernels take them, to compile, check or time single kernels.

`python -m bench aot` makes them on the meta device, the harvest on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from mapet_kernels.launch import Target
from mapet_kernels.registry import TwoStreamShape
from mapet_kernels.triton_launch import Launch
from mapet_kernels.two_stream_attention import image_order, triton_backend
from mapet_kernels.two_stream_attention.problem import Problem, Streams

VARIANTS = {
    "plain": {}, "gather": {"image_order": True}, "last_block": {"with_content": False}, "pim": {"mask_tokens": False},
}  # fmt: skip
"""Fields of a `TwoStreamShape`. "gather": image order and one cut per image; "last_block": the query stream only."""

Fill = Callable[..., Tensor]
"""(*shape, dtype) -> tensor."""


def random_on(device: torch.device) -> Fill:
    """Standard normal values, the same for every dtype."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape, dtype: torch.randn(shape, generator=generator, device=device).to(dtype)


@dataclass(frozen=True)
class Pass:
    """Operands (q, k, v, d_out) and results (out, lse, dq, dk, dv), rows (B, rows, H, D); keys and values lie together.

    perm: (B, N), where content rows are in image order.
    """

    q: Streams
    k: Tensor
    v: Tensor
    out: Streams
    lse: Streams
    d_out: Streams
    dq: Streams
    dk: Tensor
    dv: Tensor
    problem: Problem
    perm: Tensor | None

    @classmethod
    def make(cls, shape: TwoStreamShape, dtype: torch.dtype, fill: Fill, cut=None, perm: Tensor | None = None) -> Pass:
        """All tensors by `fill`. cut: a tensor, one per image, in place of the shape's."""
        problem = Problem(
            shape.tokens, shape.targets, shape.cuts if cut is None else cut, shape.mask_tokens, shape.size**-0.5
        )

        def rows(count: int, *halves: int) -> Tensor:
            return fill(shape.batch, count, *halves, shape.heads, shape.size, dtype=dtype)

        def streams() -> Streams:
            return Streams(rows(problem.content_rows) if shape.with_content else None, rows(shape.targets))

        q, d_out, out, dq = (streams() for _ in range(4))
        (k, v), (dk, dv) = (rows(problem.content_rows, 2).unbind(2) for _ in range(2))
        lse = each(lambda x: fill(*x.shape[:3], dtype=torch.promote_types(dtype, torch.float32)), out)
        return cls(q, k, v, out, lse, d_out, dq, dk, dv, problem, perm)

    def part(self, images: slice, dtype: torch.dtype) -> Pass:
        """Some images in another dtype, with results that are NaN, so that nothing unwritten goes unnoticed."""

        def cast(x: Tensor) -> Tensor:
            return x[images].to(dtype)

        def nan(x: Tensor) -> Tensor:
            return torch.full_like(x[images], float("nan"), dtype=torch.promote_types(x.dtype, dtype))

        def unwritten(x: Tensor) -> Tensor:
            return torch.full_like(cast(x), float("nan"))

        problem, (k, v) = self.problem, torch.stack([cast(self.k), cast(self.v)], dim=2).unbind(2)
        if isinstance(problem.cut, Tensor):
            problem = replace(problem, cut=problem.cut[images])
        dk, dv = torch.full_like(torch.stack([k, v], dim=2), float("nan")).unbind(2)
        return Pass(
            each(cast, self.q), k, v, each(unwritten, self.out), each(nan, self.lse), each(cast, self.d_out),
            each(unwritten, self.dq), dk, dv, problem, None if self.perm is None else self.perm[images],
        )  # fmt: skip

    def run(self, backend: ModuleType) -> dict[str, Tensor]:
        """Fill the results by a backend, forward and backward, and return those that are compared."""
        forward = (self.q, self.k, self.v, self.out, self.lse, self.problem)
        backward = (self.d_out, *forward[:-1], self.dq, self.dk, self.dv, self.problem)
        if self.perm is None:
            backend.forward(*forward)
            backend.backward(*backward)
        elif backend is triton_backend:
            backend.forward(*forward, self.perm)
            backend.backward(*backward, self.perm)
        else:
            image_order.forward(backend, self.perm, *forward)
            image_order.backward(backend, self.perm, *backward)
        found = {"out_content": self.out.content, "out_query": self.out.query, "dq_content": self.dq.content}
        found |= {"dq_query": self.dq.query, "dk": self.dk, "dv": self.dv}
        return {name: x for name, x in found.items() if x is not None}

    def launches(self, target: Target) -> list[Launch]:
        """Forward, dQ, then dK and dV."""
        forward = (self.q, self.k, self.v, self.out, self.lse)
        last = (self.problem, self.perm, target)
        backward = (self.d_out, *forward, self.dq, self.dk, self.dv, *last)
        return [triton_backend.forward_launch(*forward, *last), *triton_backend.backward_launches(*backward)]


def each(make: Callable[[Tensor], Tensor], streams: Streams) -> Streams:
    """Of both streams, or of the query stream alone."""
    return Streams(*(None if x is None else make(x) for x in (streams.content, streams.query)))
