"""Public two-stream attention: autograd, torch.compile and autocast around the backends."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from mapet_kernels.backends import TWO_STREAM_BACKENDS, choose_backend
from mapet_kernels.checks import check_integer, check_is_tensor
from mapet_kernels.registration import autocast_dtype, register_autocast
from mapet_kernels.two_stream_attention import image_order
from mapet_kernels.two_stream_attention.checks import check
from mapet_kernels.two_stream_attention.problem import Problem, Streams, split_flat

GATHERING_BACKENDS = ("triton", "flash", "cuda")
"""Backends that take `perm` themselves."""


@functools.cache
def _backend(name: str) -> ModuleType:
    """The backend's module, imported at first use: Triton and the CUDA kernels may not be installed."""
    module = {"triton": "triton_backend", "cuda": "cuda_backend"}.get(name, name)
    return importlib.import_module(f"mapet_kernels.two_stream_attention.{module}")


def two_stream_attention(
    q_content: Tensor | None,
    q_query: Tensor,
    k: Tensor,
    v: Tensor,
    cut: int | Tensor,
    *,
    perm: Tensor | None = None,
    scale: float | None = None,
    mask_tokens: bool = True,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor]:
    """Attention of MaPeT's content and query streams over the content stream's keys (MaPeT, Eq. 2 and 3).

    Rows A are the c tokens that are not predicted, B the content of the T targets, M their mask tokens, G their query
    rows. A and M see A and all of M; B_i sees A, B_0..B_i and M_j, j > i; G_i sees A, B_0..B_{i-1} and M_j, j >= i.

    Args:
        q_content: (B, N + T, H, D), rows A, B, M; None computes the query stream only (MaPeT's last block).
        q_query: (B, T, H, D), rows G in target order.
        k, v: (B, N + T, H, D), rows A, B, M. Any strides with the last dimension contiguous.
        cut: c in [0, N - 1], with T = N - c; or integers (B,), one per image. Then T is at least N - min(cut), and rows
            M_i and G_i with i >= N - cut[b] are padding: they see nothing, nothing sees them, their output is 0.
        perm: integers (B, N). Content rows are then in image order, row perm[b, r] having rank r in the permutation;
            M and query rows stay in target order. Without it content rows are in permuted order. The values
            of cuts and permutations are checked where they are on a CPU, from where they are moved. They are not on a
            GPU, which would wait for it, nor while a graph is traced: wrong ones give wrong numbers there, or torch's
            own error.
        scale: factor of the scores, a number > 0; D ** -0.5 when not given.
        mask_tokens: False is permuted image modelling (PIM, XLNet): no rows and keys M, content tensors (B, N, H, D).
        backend: "auto", "triton" (head sizes up to 128), "flash" (fp16 and bf16, head sizes up to 256), "cuda" (fp16
            and bf16, head sizes up to 128, where csrc/ is built), "sdpa", "matmul" or "reference".

    Returns:
        (out_content, out_query), shaped as q_content (None where it is) and q_query, in their dtype (under autocast,
        the region's), contiguous. Where out_query alone receives a gradient, the backward pass is that of the query
        stream.

    Raises:
        ValueError: shapes, devices, cut, permutation, scale or backend do not fit.
        TypeError: an argument has the wrong type, or the tensors do not share one floating-point dtype (under autocast
            they need not).
    """
    problem = check(q_content, q_query, k, v, cut, perm, mask_tokens, scale)
    one_cut, cuts = (
        (-1, problem.cut.to(q_query.device, torch.int64)) if isinstance(problem.cut, Tensor) else (problem.cut, None)
    )
    perm = None if perm is None else perm.to(q_query.device, torch.int64)
    name = choose_backend(backend, q_query.device, autocast_dtype(q_query), TWO_STREAM_BACKENDS, q_query.shape[-1])
    out_content, out_query, _, _ = two_stream_attention_op(
        q_content, q_query, k, v, one_cut, cuts, perm, mask_tokens, problem.scale, name
    )
    return None if q_content is None else out_content, out_query


def two_stream_attention_packed(
    q: Tensor,
    kv: Tensor,
    cut: int,
    targets: int,
    *,
    scale: float | None = None,
    mask_tokens: bool = True,
    backend: str = "auto",
) -> Tensor:
    """`two_stream_attention` on the flat token buffer: reads what projections wrote, writes what the next one reads.

    Args:
        q: (B * (N + T) + B * T, H, D), the content rows of all images, then their query rows; or (B * T, H, D), query
            rows only (MaPeT's last block).
        kv: (B, N + T, 2, H, D), keys and values of the content stream; (B, N, 2, H, D) without mask tokens.
        cut: c; content rows are in permuted order.
        targets: T.
        scale, mask_tokens, backend: as in `two_stream_attention`.

    Returns:
        The attention output in the layout and dtype of q.

    Raises:
        ValueError, TypeError: as `two_stream_attention`.
    """
    check_is_tensor(q=q, kv=kv)
    cut = check_integer("cut", cut, "an int (two_stream_attention takes one per image)")
    targets = check_integer("targets", targets)
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv must be (B, rows, 2, H, D), got {tuple(kv.shape)}")
    batch, content_rows, _, heads, size = kv.shape
    with_content = q.shape[0] == batch * (content_rows + targets)
    if q.dim() != 3 or q.shape[1:] != kv.shape[3:] or not (with_content or q.shape[0] == batch * targets):
        raise ValueError(
            f"q must be ({batch * (content_rows + targets)} or, query rows only, {batch * targets}, {heads}, {size}) "
            f"for kv {tuple(kv.shape)} and {targets} targets, got {tuple(q.shape)}"
        )
    tokens = content_rows - targets if mask_tokens else content_rows
    streams = split_flat(q, batch, Problem(tokens, targets, cut, mask_tokens, 1.0), with_content)
    k, v = kv.unbind(2)
    problem = check(streams.content, streams.query, k, v, cut, None, mask_tokens, scale)
    name = choose_backend(backend, q.device, autocast_dtype(q), TWO_STREAM_BACKENDS, q.shape[-1])
    out, _ = two_stream_attention_packed_op(q, kv, cut, targets, mask_tokens, problem.scale, name)
    return out


def _problem(q_query: Tensor, k: Tensor, cut: int, cuts: Tensor | None, mask_tokens: bool, scale: float) -> Problem:
    targets = q_query.shape[1]
    tokens = k.shape[1] - targets if mask_tokens else k.shape[1]
    if cuts is None and not 0 <= cut == tokens - targets:  # what kernels count rows by, so that it is looked at again
        raise ValueError(f"cut must be N - T = {tokens - targets} and not negative, got {cut}")
    return Problem(tokens, targets, cut if cuts is None else cuts, mask_tokens, scale)


def _packed_problem(q: Tensor, kv: Tensor, cut: int, targets: int, mask_tokens: bool, scale: float):
    """(problem, streams of q, k, v) of the packed layout."""
    batch, content_rows = kv.shape[:2]
    problem = Problem(content_rows - targets if mask_tokens else content_rows, targets, cut, mask_tokens, scale)
    k, v = kv.unbind(2)
    return problem, split_flat(q, batch, problem, q.shape[0] != batch * targets), k, v


def _statistics_like(out: Tensor) -> Tensor:
    """Uninitialised log-sum-exps (..., H) for an output (..., H, D)."""
    return out.new_empty(out.shape[:-1], dtype=torch.promote_types(out.dtype, torch.float32))


def _content_like(q_content: Tensor | None, q_query: Tensor) -> Tensor:
    """Uninitialised memory for the content stream, for none of its images where there is no content stream."""
    return q_query.new_empty(0, *q_query.shape[1:]) if q_content is None else q_content.new_empty(q_content.shape)


def _results_like(q_content: Tensor | None, q_query: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised outputs, then log-sum-exps, of content (empty where there is none) and query stream."""
    content, query = _content_like(q_content, q_query), q_query.new_empty(q_query.shape)
    return content, query, _statistics_like(content), _statistics_like(query)


@torch.library.custom_op("mapet_kernels::two_stream_attention", mutates_args=())
def two_stream_attention_op(
    q_content: Tensor | None,
    q_query: Tensor,
    k: Tensor,
    v: Tensor,
    cut: int,
    cuts: Tensor | None,
    perm: Tensor | None,
    mask_tokens: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs (B, rows, H, D) of content and query stream, and their log-sum-exps (B, rows, H).

    Those of the content stream are of no image where q_content is None.
    """
    problem = _problem(q_query, k, cut, cuts, mask_tokens, scale)
    out_content, out_query, lse_content, lse_query = results = _results_like(q_content, q_query)
    q, out, lse = (
        _streams(q_content is not None, *pair)
        for pair in ((q_content, q_query), (out_content, out_query), (lse_content, lse_query))
    )
    if perm is None:
        _backend(backend).forward(q, k, v, out, lse, problem)
    elif backend in GATHERING_BACKENDS:
        _backend(backend).forward(q, k, v, out, lse, problem, perm)
    else:
        image_order.forward(_backend(backend), perm, q, k, v, out, lse, problem)
    return results


@two_stream_attention_op.register_fake
def _(q_content, q_query, k, v, cut, cuts, perm, mask_tokens, scale, backend):
    return _results_like(q_content, q_query)


@torch.library.custom_op("mapet_kernels::two_stream_attention_backward", mutates_args=())
def two_stream_attention_backward_op(
    d_content: Tensor | None,
    d_query: Tensor,
    q_content: Tensor | None,
    q_query: Tensor,
    k: Tensor,
    v: Tensor,
    out_content: Tensor,
    out_query: Tensor,
    lse_content: Tensor,
    lse_query: Tensor,
    cut: int,
    cuts: Tensor | None,
    perm: Tensor | None,
    mask_tokens: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q_content (empty where it is None), q_query, k and v; d_content is None where q_content is."""
    problem = _problem(q_query, k, cut, cuts, mask_tokens, scale)
    dq_content, dq_query, dk, dv = gradients = _gradients_like(q_content, q_query, k, v)
    d_out, q, out, lse, dq = (
        _streams(q_content is not None, *pair)
        for pair in (
            (d_content, d_query),
            (q_content, q_query),
            (out_content, out_query),
            (lse_content, lse_query),
            (dq_content, dq_query),
        )
    )
    if perm is None:
        _backend(backend).backward(d_out, q, k, v, out, lse, dq, dk, dv, problem)
    elif backend in GATHERING_BACKENDS:
        _backend(backend).backward(d_out, q, k, v, out, lse, dq, dk, dv, problem, perm)
    else:
        image_order.backward(_backend(backend), perm, d_out, q, k, v, out, lse, dq, dk, dv, problem)
    return gradients


@two_stream_attention_backward_op.register_fake
def _(
    d_content, d_query, q_content, q_query, k, v, out_content, out_query, lse_content, lse_query, cut, cuts, perm,
    mask_tokens, scale, backend,
):  # fmt: skip
    return _gradients_like(q_content, q_query, k, v)


def _streams(with_content: bool, content: Tensor | None, query: Tensor) -> Streams:
    return Streams(content if with_content else None, query)


def _gradients_like(q_content, q_query, k, v) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _content_like(q_content, q_query), *(x.new_empty(x.shape) for x in (q_query, k, v))


def _save(ctx, inputs, output):
    q_content, q_query, k, v, cut, cuts, perm, *options = inputs
    ctx.save_for_backward(q_content, q_query, k, v, *output, cuts, perm)
    ctx.set_materialize_grads(False)
    ctx.cut, ctx.options = cut, options


def _backward(ctx, d_content, d_query, d_lse_content, d_lse_query):
    q_content, q_query, k, v, out_content, out_query, lse_content, lse_query, cuts, perm = ctx.saved_tensors
    if d_content is None and d_query is None:
        return (None,) * 10
    # Content rows without a gradient give none to keys and values: what is left is the problem of the last block.
    from_content = q_content is not None and d_content is not None
    dq_content, dq_query, dk, dv = two_stream_attention_backward_op(
        d_content.contiguous() if from_content else None,
        torch.zeros_like(out_query) if d_query is None else d_query.contiguous(),
        q_content if from_content else None,
        *(q_query, k, v, out_content, out_query, lse_content, lse_query, ctx.cut, cuts, perm, *ctx.options),
    )
    if not from_content:
        dq_content = torch.zeros_like(q_content) if ctx.needs_input_grad[0] else None
    return dq_content, dq_query, dk, dv, *(None,) * 6


two_stream_attention_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("mapet_kernels::two_stream_attention_packed", mutates_args=())
def two_stream_attention_packed_op(
    q: Tensor, kv: Tensor, cut: int, targets: int, mask_tokens: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Output in the layout of q (rows, H, D), and its log-sum-exp (rows, H)."""
    problem, streams, k, v = _packed_problem(q, kv, cut, targets, mask_tokens, scale)
    flat = q.new_empty(q.shape)
    flat_lse = _statistics_like(flat)
    out, lse = (split_flat(x, kv.shape[0], problem, streams.content is not None) for x in (flat, flat_lse))
    _backend(backend).forward(streams, k, v, out, lse, problem)
    return flat, flat_lse


@two_stream_attention_packed_op.register_fake
def _(q, kv, cut, targets, mask_tokens, scale, backend):
    flat = q.new_empty(q.shape)
    return flat, _statistics_like(flat)


@torch.library.custom_op("mapet_kernels::two_stream_attention_packed_backward", mutates_args=())
def two_stream_attention_packed_backward_op(
    d_flat: Tensor,
    q: Tensor,
    kv: Tensor,
    flat: Tensor,
    flat_lse: Tensor,
    cut: int,
    targets: int,
    mask_tokens: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and kv in their layouts."""
    problem, streams, k, v = _packed_problem(q, kv, cut, targets, mask_tokens, scale)
    dq_flat, dkv = q.new_empty(q.shape), kv.new_empty(kv.shape)
    d_out, out, lse, dq = (
        split_flat(x, kv.shape[0], problem, streams.content is not None) for x in (d_flat, flat, flat_lse, dq_flat)
    )
    _backend(backend).backward(d_out, streams, k, v, out, lse, dq, *dkv.unbind(2), problem)
    return dq_flat, dkv


@two_stream_attention_packed_backward_op.register_fake
def _(d_flat, q, kv, flat, flat_lse, cut, targets, mask_tokens, scale, backend):
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def _save_packed(ctx, inputs, output):
    q, kv, *ctx.options = inputs
    ctx.save_for_backward(q, kv, *output)
    ctx.set_materialize_grads(False)


def _backward_packed(ctx, d_flat, d_lse):
    if d_flat is None:
        return (None,) * 7
    gradients = two_stream_attention_packed_backward_op(d_flat.contiguous(), *ctx.saved_tensors, *ctx.options)
    return *gradients, *(None,) * 5


two_stream_attention_packed_op.register_autograd(_backward_packed, setup_context=_save_packed)

for _op in (two_stream_attention_op, two_stream_attention_packed_op):
    register_autocast(_op)
