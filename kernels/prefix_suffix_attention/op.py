"""Public prefix-suffix attention: autograd, torch.compile and autocast around the backends."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from mapet_kernels.backends import PREFIX_SUFFIX_BACKENDS, choose_backend
from mapet_kernels.checks import (
    Shapes,
    advice_to_transpose,
    check_cut,
    check_device,
    check_integer,
    check_is_tensor,
    check_scale,
    check_tensors,
    is_integer,
)
from mapet_kernels.prefix_suffix_attention import reference, sdpa
from mapet_kernels.prefix_suffix_attention.problem import Problem
from mapet_kernels.registration import autocast_dtype, register_autocast
from mapet_kernels.visibility import prefix_suffix_mask

BACKENDS = {
    "reference": (reference.masked_attention, reference.masked_attention_backward),
    "sdpa": (sdpa.forward, sdpa.backward),
}
"""Forward and backward of the backends that are given a dense mask."""


@functools.cache
def _triton_backend() -> ModuleType:
    """Imported at first use: Triton may not be installed, and takes its time."""
    return importlib.import_module("mapet_kernels.prefix_suffix_attention.triton_backend")


def prefix_suffix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    cut: int | Tensor = 0,
    *,
    suffix_keys: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one stream where a row of shift s sees content keys j < cut + s and suffix keys j >= s.

    The general form of the rule in `mapet_kernels.visibility`, which has the shifts of causal, prefix-LM and
    masked-image models. A row that sees no key yields 0 and has zero gradients.

    Args:
        q: (B, R, H, D).
        k, v: (B, C + S, H, D), content keys, then suffix keys. Any strides with the last dimension contiguous.
        shift: integers (R,), or (B, R) with one set per image; any values in any order. On the device of q, or on the
            CPU, from where they are moved.
        cut: int, or integers (B,); any values.
        suffix_keys: S, the number of trailing keys that follow the suffix rule.
        scale: factor of the scores, a number > 0; D ** -0.5 when not given.
        backend: "auto", "triton" (head sizes up to 128), "sdpa" or "reference".

    Returns:
        (B, R, H, D) in q's dtype (under autocast, the region's).

    Raises:
        ValueError: shapes, devices, scale or backend do not fit.
        TypeError: an argument has the wrong type, or the tensors do not share one floating-point dtype (under autocast
            they need not).
    """
    cut, suffix_keys, scale = _check(q, k, v, shift, cut, suffix_keys, scale)
    one_cut, cuts = (0, cut.to(q.device, torch.int64)) if isinstance(cut, Tensor) else (cut, None)
    name = choose_backend(backend, q.device, autocast_dtype(q), PREFIX_SUFFIX_BACKENDS, q.shape[-1])
    shift = shift.to(q.device, torch.int64)
    return prefix_suffix_attention_op(q, k, v, shift, one_cut, cuts, suffix_keys, scale, name)[0]


def _check(
    q: Tensor, k: Tensor, v: Tensor, shift: Tensor, cut: int | Tensor, suffix_keys: int, scale: float | None
) -> tuple[int | Tensor, int, float]:
    """(cut, suffix_keys, scale) as the op takes them, or ValueError / TypeError.

    Values of shifts and cuts are not looked at: they index no memory, and every one of them has a meaning.
    """
    check_is_tensor(q=q, k=k, v=v, shift=shift)
    if q.dim() != 4:
        raise ValueError(f"q must be (B, R, H, D), got {tuple(q.shape)}")
    if not is_integer(shift):
        raise ValueError(f"shift must be integers (R,) or (B, R), got {shift.dtype} {tuple(shift.shape)}")
    cut = check_cut(cut, q.shape[0], q.device)
    suffix_keys = check_integer("suffix_keys", suffix_keys)
    shapes = {"q": q.shape, "k": k.shape, "v": v.shape}
    if (misfit := _misfit(shapes, shift.shape, suffix_keys)) is not None:
        advice = advice_to_transpose(shapes, lambda others: _misfit(others, shift.shape, suffix_keys))
        raise ValueError(f"{misfit}{advice}")
    check_tensors(q=q, k=k, v=v)
    check_device(q.device, shift=shift)
    return cut, suffix_keys, check_scale(scale, q.shape[-1])


def _misfit(shapes: Shapes, shift: torch.Size, suffix_keys: int) -> str | None:
    """What keeps the shapes from fitting together, None where they fit."""
    q, k, v = shapes["q"], shapes["k"], shapes["v"]
    batch, rows, heads, size = q
    if len(k) != 4 or k != v or (k[0], *k[2:]) != (batch, heads, size):
        return f"k and v must both be ({batch}, keys, {heads}, {size}) like q {tuple(q)}, got {tuple(k)} and {tuple(v)}"
    if shift not in ((rows,), (batch, rows)):
        return f"shift must be integers (R,) = ({rows},) or (B, R) = ({batch}, {rows}), got shape {tuple(shift)}"
    if not 0 <= suffix_keys <= k[1]:
        return f"suffix_keys must be in [0, {k[1]}], the number of keys, got {suffix_keys}"
    return None


def _visible(k: Tensor, shift: Tensor, cut: int, cuts: Tensor | None, suffix_keys: int) -> Tensor:
    return prefix_suffix_mask(shift, cut if cuts is None else cuts, k.shape[1] - suffix_keys, suffix_keys)


@torch.library.custom_op("mapet_kernels::prefix_suffix_attention", mutates_args=())
def prefix_suffix_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    cut: int,
    cuts: Tensor | None,
    suffix_keys: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output (B, R, H, D) and log-sum-exp (B, R, H)."""
    if backend == "triton":
        out, lse = _results_like(q)
        problem = Problem(shift, cut if cuts is None else cuts, suffix_keys, scale)
        _triton_backend().forward(q, k, v, out, lse, problem)
        return out, lse
    out, lse = BACKENDS[backend][0](q, k, v, _visible(k, shift, cut, cuts, suffix_keys), scale)
    return out.contiguous(), lse.contiguous()


@prefix_suffix_attention_op.register_fake
def _(q, k, v, shift, cut, cuts, suffix_keys, scale, backend):
    return _results_like(q)


def _results_like(q: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised output and log-sum-exp."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("mapet_kernels::prefix_suffix_attention_backward", mutates_args=())
def prefix_suffix_attention_backward_op(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    out: Tensor,
    lse: Tensor,
    cut: int,
    cuts: Tensor | None,
    suffix_keys: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    if backend == "triton":
        gradients = _gradients_like(q, k, v)
        problem = Problem(shift, cut if cuts is None else cuts, suffix_keys, scale)
        _triton_backend().backward(d_out, q, k, v, out, lse, *gradients, problem)
        return gradients
    visible = _visible(k, shift, cut, cuts, suffix_keys)
    gradients = BACKENDS[backend][1](d_out, q, k, v, visible, scale, out, lse)
    return tuple(gradient.contiguous() for gradient in gradients)


@prefix_suffix_attention_backward_op.register_fake
def _(d_out, q, k, v, shift, out, lse, cut, cuts, suffix_keys, scale, backend):
    return _gradients_like(q, k, v)


def _gradients_like(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs)


def _save(ctx, inputs, output):
    q, k, v, shift, cut, cuts, *options = inputs
    ctx.save_for_backward(q, k, v, shift, *output, cuts)
    ctx.set_materialize_grads(False)
    ctx.cut, ctx.options = cut, options


def _backward(ctx, d_out, d_lse):
    if d_out is None:
        return (None,) * 9
    q, k, v, shift, out, lse, cuts = ctx.saved_tensors
    gradients = prefix_suffix_attention_backward_op(
        d_out.contiguous(), q, k, v, shift, out, lse, ctx.cut, cuts, *ctx.options
    )
    return *gradients, *(None,) * 6


prefix_suffix_attention_op.register_autograd(_backward, setup_context=_save)
register_autocast(prefix_suffix_attention_op)
