"""One cut per image, for a backend that takes one cut a call: the images of each distinct cut, without their padding.

Padding rows get output 0, log-sum-exp -inf and no gradient. The cuts are read on the host, which waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from mapet_kernels.two_stream_attention.problem import Problem, Streams


def forward(
    run: Callable[..., None],
    q: Streams,
    k: Tensor,
    v: Tensor,
    out: Streams,
    lse: Streams,
    problem: Problem,
    perm: Tensor | None = None,
) -> None:
    """A backend's forward, `run`, on the images of each cut in turn; perm (B, N), where given, is its last argument."""
    _fill(0, out.content, out.query)
    _fill(float("-inf"), lse.content, lse.query)
    for index, one in _groups(problem):
        part_out, part_lse = _trim(out, index, one), _trim(lse, index, one)
        keys = (_trim_keys(x, index, one) for x in (k, v))
        run(_trim(q, index, one), *keys, part_out, part_lse, one, *_of_images(perm, index))
        _untrim(part_out, out, index)
        _untrim(part_lse, lse, index)


def backward(
    run: Callable[..., None],
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
    perm: Tensor | None = None,
) -> None:
    """A backend's backward, `run`, on the images of each cut in turn."""
    _fill(0, dq.content, dq.query, dk, dv)
    for index, one in _groups(problem):
        part_d_out, part_q, part_out, part_lse, part_dq = (_trim(s, index, one) for s in (d_out, q, out, lse, dq))
        part_k, part_v, part_dk, part_dv = (_trim_keys(x, index, one) for x in (k, v, dk, dv))
        run(
            *(part_d_out, part_q, part_k, part_v, part_out, part_lse, part_dq, part_dk, part_dv, one),
            *_of_images(perm, index),
        )
        _untrim(part_dq, dq, index)
        dk[index, : part_dk.shape[1]] = part_dk
        dv[index, : part_dv.shape[1]] = part_dv


def _groups(problem: Problem) -> Iterator[tuple[Tensor, Problem]]:
    """The images of each distinct cut, and their problem without padding."""
    for cut in problem.cut.unique().tolist():
        index = (problem.cut == cut).nonzero().squeeze(1)
        yield index, replace(problem, cut=cut, targets=problem.tokens - cut)


def _of_images(perm: Tensor | None, index: Tensor) -> tuple[Tensor, ...]:
    return () if perm is None else (perm[index],)


def _trim_keys(x: Tensor, index: Tensor, one: Problem) -> Tensor:
    return x[index, : one.content_rows]


def _trim(streams: Streams, index: Tensor, one: Problem) -> Streams:
    content = None if streams.content is None else _trim_keys(streams.content, index, one)
    return Streams(content, streams.query[index, : one.targets])


def _untrim(part: Streams, whole: Streams, index: Tensor) -> None:
    if whole.content is not None:
        whole.content[index, : part.content.shape[1]] = part.content
    whole.query[index, : part.query.shape[1]] = part.query


def _fill(value: float, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            tensor.fill_(value)
