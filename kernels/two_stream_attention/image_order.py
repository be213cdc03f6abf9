"""Content rows kept in image order: gather them into permuted order for a backend, scatter what it returns."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mapet_kernels.two_stream_attention.problem import Problem, Streams


def forward(
    backend: ModuleType, perm: Tensor, q: Streams, k: Tensor, v: Tensor, out: Streams, lse: Streams, problem: Problem
) -> None:
    """`backend.forward` with content rows, keys and results in image order; perm is int64 (B, N)."""
    part_out, part_lse = out.empty_like(), lse.empty_like()
    backend.forward(_gather(q, perm), _gather_rows(k, perm), _gather_rows(v, perm), part_out, part_lse, problem)
    _scatter(part_out, out, perm)
    _scatter(part_lse, lse, perm)


def backward(
    backend: ModuleType,
    perm: Tensor,
    d_out: Streams,
    q: Streams,
    k: Tensor,
    v: Tensor,
    out: Streams,
    lse: Streams,
    dq: Streams,
    dk: Tensor,
    dv: Tensor,
    problem: Problem,
) -> None:
    """`backend.backward` with content rows, keys and gradients in image order."""
    part_dq, part_dk, part_dv = dq.empty_like(), torch.empty_like(dk), torch.empty_like(dv)
    backend.backward(
        _gather(d_out, perm),
        _gather(q, perm),
        _gather_rows(k, perm),
        _gather_rows(v, perm),
        _gather(out, perm),
        _gather(lse, perm),
        part_dq,
        part_dk,
        part_dv,
        problem,
    )
    _scatter(part_dq, dq, perm)
    _scatter_rows(part_dk, dk, perm)
    _scatter_rows(part_dv, dv, perm)


def _index(perm: Tensor, x: Tensor) -> Tensor:
    return perm.view(*perm.shape, *(1 for _ in x.shape[2:])).expand(*perm.shape, *x.shape[2:])


def _gather_rows(x: Tensor, perm: Tensor) -> Tensor:
    tokens = perm.shape[1]
    return torch.cat([x[:, :tokens].gather(1, _index(perm, x)), x[:, tokens:]], dim=1)


def _scatter_rows(x: Tensor, out: Tensor, perm: Tensor) -> None:
    tokens = perm.shape[1]
    out[:, :tokens].scatter_(1, _index(perm, x), x[:, :tokens])
    out[:, tokens:] = x[:, tokens:]


def _gather(streams: Streams, perm: Tensor) -> Streams:
    return Streams(None if streams.content is None else _gather_rows(streams.content, perm), streams.query)


def _scatter(part: Streams, out: Streams, perm: Tensor) -> None:
    if part.content is not None:
        _scatter_rows(part.content, out.content, perm)
    out.query.copy_(part.query)
