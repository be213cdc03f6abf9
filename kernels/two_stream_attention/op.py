"""Public two-stream attention: autograd, torch.compile and autocast around the backends."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from mapet_kernels.backends import TWO_STREAM_BACKENDS, choose_backend
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
            Cuts on a GPU are not checked, which would wait for the device.
        perm: integers (B, N). Content rows are then in image order, row perm[b, r] having rank r in the permutation;
            M and query rows stay in target order. Without it content rows are in permuted order.
        scale: factor of the scores; D ** -0.5 when not given.
        mask_tokens: False is permuted image modelling (PIM, XLNet): no rows and keys M, content tensors (B, N, H, D).
        backend: "auto", "triton" (head sizes up to 128), "flash" (fp16 and bf16, head sizes up to 256), "cuda" (fp16
            and bf16, head sizes up to 128, where csrc/ is built), "sdpa", "matmul" or "reference".

    Returns:
        (out_content, out_query), shaped as q_content (None where it is) and q_query, in their dtype (under autocast,
        the region's). Both are views of one buffer (B * (N + T) + B * T, H, D).

    Raises:
        ValueError: shapes, devices, cut, permutation or backend do not fit.
        TypeError: the tensors do not share one floating-point dtype (under autocast they need not).
    """
    problem = check(q_content, q_query, k, v, cut, perm, mask_tokens, scale)
    one_cut, cuts = (-1, cut.to(q_query.device, torch.int64)) if isinstance(cut, Tensor) else (cut, None)
    perm = None if perm is None else perm.to(q_query.device, torch.int64)
    name = choose_backend(backend, q_query.device, autocast_dtype(q_query), TWO_STREAM_BACKENDS, q_query.shape[-1])
    out, _ = two_stream_attention_op(q_content, q_query, k, v, one_cut, cuts, perm, mask_tokens, problem.scale, name)
    streams = split_flat(out, q_query.shape[0], problem, q_content is not None)
    return streams.content, streams.query


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
    return Problem(tokens, targets, cut if cuts is None else cuts, mask_tokens, scale)


def _packed_problem(q: Tensor, kv: Tensor, cut: int, targets: int, mask_tokens: bool, scale: float):
    """(problem, streams of q, k, v) of the packed layout."""
    batch, content_rows = kv.shape[:2]
    problem = Problem(content_rows - targets if mask_tokens else content_rows, targets, cut, mask_tokens, scale)
    k, v = kv.unbind(2)
    return problem, split_flat(q, batch, problem, q.shape[0] != batch * targets), k, v


def _statistics_like(out: Tensor) -> Tensor:
    """Uninitialised log-sum-exps (rows, H) for an output (rows, H, D)."""
    return out.new_empty(out.shape[:2], dtype=torch.promote_types(out.dtype, torch.float32))


def _flat_output(q_content: Tensor | None, q_query: Tensor) -> tuple[Tensor, Tensor]:
    rows = sum(t.shape[0] * t.shape[1] for t in (q_content, q_query) if t is not None)
    out = q_query.new_empty(rows, *q_query.shape[2:])
    return out, _statistics_like(out)


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
) -> tuple[Tensor, Tensor]:
    """Flat output (rows, H, D) and its log-sum-exp (rows, H); all content streams, then all query streams."""
    problem = _problem(q_query, k, cut, cuts, mask_tokens, scale)
    flat, flat_lse = _flat_output(q_content, q_query)
    out, lse = (split_flat(x, q_query.shape[0], problem, q_content is not None) for x in (flat, flat_lse))
    q = Streams(q_content, q_query)
    if perm is None:
        _backend(backend).forward(q, k, v, out, lse, problem)
    elif backend in GATHERING_BACKENDS:
        _backend(backend).forward(q, k, v, out, lse, problem, perm)
    else:
        image_order.forward(_backend(backend), perm, q, k, v, out, lse, problem)
    return flat, flat_lse


@two_stream_attention_op.register_fake
def _(q_content, q_query, k, v, cut, cuts, perm, mask_tokens, scale, backend):
    return _flat_output(q_content, q_query)


@torch.library.custom_op("mapet_kernels::two_stream_attention_backward", mutates_args=())
def two_stream_attention_backward_op(
    d_flat: Tensor,
    q_content: Tensor | None,
    q_query: Tensor,
    k: Tensor,
    v: Tensor,
    flat: Tensor,
    flat_lse: Tensor,
    cut: int,
    cuts: Tensor | None,
    perm: Tensor | None,
    mask_tokens: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q_content (empty where it is None), q_query, k and v."""
    problem = _problem(q_query, k, cut, cuts, mask_tokens, scale)
    d_out, out, lse = (
        split_flat(x, q_query.shape[0], problem, q_content is not None) for x in (d_flat, flat, flat_lse)
    )
    dq_content, dq_query, dk, dv = _gradients_like(q_content, q_query, k, v)
    q, dq = Streams(q_content, q_query), Streams(None if q_content is None else dq_content, dq_query)
    if perm is None:
        _backend(backend).backward(d_out, q, k, v, out, lse, dq, dk, dv, problem)
    elif backend in GATHERING_BACKENDS:
        _backend(backend).backward(d_out, q, k, v, out, lse, dq, dk, dv, problem, perm)
    else:
        image_order.backward(_backend(backend), perm, d_out, q, k, v, out, lse, dq, dk, dv, problem)
    return dq_content, dq_query, dk, dv


@two_stream_attention_backward_op.register_fake
def _(d_flat, q_content, q_query, k, v, flat, flat_lse, cut, cuts, perm, mask_tokens, scale, backend):
    return _gradients_like(q_content, q_query, k, v)


def _gradients_like(q_content, q_query, k, v) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq_content = q_query.new_empty(0) if q_content is None else q_content.new_empty(q_content.shape)
    return dq_content, q_query.new_empty(q_query.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q_content, q_query, k, v, cut, cuts, perm, *options = inputs
    ctx.save_for_backward(q_content, q_query, k, v, *output, cuts, perm)
    ctx.set_materialize_grads(False)
    ctx.cut, ctx.options = cut, options


def _backward(ctx, d_flat, d_lse):
    q_content, q_query, k, v, flat, flat_lse, cuts, perm = ctx.saved_tensors
    if d_flat is None:
        return (None,) * 10
    dq_content, dq_query, dk, dv = two_stream_attention_backward_op(
        d_flat.contiguous(), q_content, q_query, k, v, flat, flat_lse, ctx.cut, cuts, perm, *ctx.options
    )
    return None if q_content is None else dq_content, dq_query, dk, dv, *(None,) * 6


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
