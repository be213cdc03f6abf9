"""Launches of the Triton kernels of two-stream attention, on a GPU or, with TRITON_INTERPRET=1, on CPU tensors.

Beyond the other backends' interface it takes `perm` (B, N): content rows in image order are gathered in the kernels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
from torch import Tensor

from mapet_kernels import attention_launch, launch
from mapet_kernels.attention_launch import check, dense_rows, gathering_stages, strides
from mapet_kernels.launch import LaunchConfig
from mapet_kernels.triton_launch import Launch, target
from mapet_kernels.two_stream_attention import kernel
from mapet_kernels.two_stream_attention.problem import Problem, Streams
from mapet_kernels.two_stream_attention.tiles import Shape, fewest_visits


def forward(
    q: Streams, k: Tensor, v: Tensor, out: Streams, lse: Streams, problem: Problem, perm: Tensor | None = None
) -> None:
    """Fill `out` (B, rows, H, D) and `lse` (B, rows, H), contiguous streams each."""
    check(q.query, *_tensors(out, lse))
    q, k, v = Streams(dense_rows(q.content), dense_rows(q.query)), dense_rows(k), dense_rows(v)
    forward_launch(q, k, v, out, lse, problem, perm, target(k.device)).run(k.device)


def backward(
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
    """Fill `dq` (contiguous streams), `dk` and `dv` (last stride 1); `out` and `lse` are those of `forward`."""
    check(q.query, *_tensors(d_out, out, lse, dq))
    q, k, v = Streams(dense_rows(q.content), dense_rows(q.query)), dense_rows(k), dense_rows(v)
    for part in backward_launches(d_out, q, k, v, out, lse, dq, dk, dv, problem, perm, target(k.device)):
        part.run(k.device)


def forward_launch(
    q: Streams,
    k: Tensor,
    v: Tensor,
    out: Streams,
    lse: Streams,
    problem: Problem,
    perm: Tensor | None,
    target: launch.Target,
) -> Launch:
    """The launch of `forward` for a target."""
    config = _gathering(launch.attention_forward(k.shape[-1], k.dtype, target), perm)
    tiles = triton.cdiv(_rows(problem, q.content is not None), config.rows)
    return Launch(
        kernel.forward_kernel,
        tiles * k.shape[0] * k.shape[2],
        (
            *(*_both(q), k, v, *_both(out), *_both(lse), *_per_image(problem, perm)),
            *(*strides(*_both(q), k, v), *_sizes(problem, k), tiles),
        ),
        _constants(problem, config, q.content is not None, k, v, *_both(q), *_both(out)),
    )


def backward_launches(
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
    perm: Tensor | None,
    target: launch.Target,
) -> tuple[Launch, Launch]:
    """The launches of `backward`, in order: dQ, then dK and dV."""
    with_content = q.content is not None
    config = _gathering(launch.attention_query_gradient(k.shape[-1], k.dtype, target), perm)
    key_config = _gathering(launch.attention_key_gradient(k.shape[-1], k.dtype, target), perm)
    # Of every row, from the first kernel for the second: log-sum-exp in base 2, and rowsum(dO * O).
    tiles = triton.cdiv(_rows(problem, with_content), config.rows)
    statistics = lse.query.new_empty(k.shape[0], k.shape[2], tiles * config.rows + key_config.rows, 2)
    query_gradient = Launch(
        kernel.query_gradient_kernel,
        tiles * k.shape[0] * k.shape[2],
        (
            *(*_both(q), k, v, *_both(out), *_both(d_out), *_both(lse), statistics, *_both(dq)),
            *(*_per_image(problem, perm), *strides(*_both(q), k, v), *_sizes(problem, k), tiles),
        ),
        _constants(problem, config, with_content, k, v, *_both(q), *_both(out), *_both(d_out), *_both(dq))
        | {"TAIL": key_config.rows},
    )
    tiles, skipped = _key_tiles(problem, with_content, key_config)
    key_gradient = Launch(
        kernel.key_gradient_kernel,
        tiles * k.shape[0] * k.shape[2],
        (
            *(*_both(q), k, v, *_both(d_out), statistics, dk, dv, *_per_image(problem, perm)),
            *(*strides(*_both(q), k, v, dk, dv), *_sizes(problem, k), tiles, skipped, statistics.shape[2]),
        ),
        _constants(problem, key_config, with_content, k, v, *_both(q), *_both(d_out), dk, dv),
    )
    return query_gradient, key_gradient


def _gathering(config: LaunchConfig, perm: Tensor | None) -> LaunchConfig:
    """The configuration for content rows that are gathered, where there is a permutation."""
    return config if perm is None else replace(config, stages=gathering_stages(config))


def _rows(problem: Problem, with_content: bool) -> int:
    """Rows of one image and head that the forward and dQ kernels go through; the grid cannot follow cuts on the device.

    With mask tokens N rows have s = 0, without c rows; then come two rows a target, or one without content.
    """
    if not with_content:
        return problem.targets
    first = problem.tokens if problem.mask_tokens or isinstance(problem.cut, Tensor) else problem.cut
    return first + 2 * problem.targets


def _key_tiles(problem: Problem, with_content: bool, config: LaunchConfig) -> tuple[int, int]:
    """Key tiles of one image and head, and how many keys the first is short of; any number is right, one is fastest."""
    skipped = 0
    if not isinstance(problem.cut, Tensor):
        shape = Shape(problem.tokens, problem.cut, with_content, problem.mask_tokens)
        skipped = fewest_visits(shape, config.rows, config.keys)
    return triton.cdiv(problem.content_rows + skipped, config.keys), skipped


def _tensors(*streams: Streams) -> tuple[Tensor | None, ...]:
    return tuple(tensor for pair in streams for tensor in (pair.content, pair.query))


def _both(streams: Streams) -> tuple[Tensor, Tensor]:
    """(content, query); the kernels ignore the first where there is no content stream."""
    return streams.query if streams.content is None else streams.content, streams.query


def _per_image(problem: Problem, perm: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(cuts, perm), contiguous where they are given."""
    cuts = problem.cut.contiguous() if isinstance(problem.cut, Tensor) else None
    return cuts, None if perm is None else perm.contiguous()


def _sizes(problem: Problem, k: Tensor) -> tuple[float, int, int, int, int]:
    """(scale, cut, N, T, heads); the kernels do not read the cut where there is one per image."""
    cut = 0 if isinstance(problem.cut, Tensor) else problem.cut
    return float(problem.scale), cut, problem.tokens, problem.targets, k.shape[2]


def _constants(
    problem: Problem, config: LaunchConfig, with_content: bool, k: Tensor, *others: Tensor
) -> dict[str, Any]:
    """Constants and options of a kernel that moves the rows of k and others."""
    return attention_launch.constants(config, k, *others) | {
        "WITH_CONTENT": with_content,
        "MASK_TOKENS": problem.mask_tokens,
    }
