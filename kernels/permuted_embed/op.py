"""Public permuted embedding: from images and permutations to the flat token buffer."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mapet_kernels.backends import choose_listed_backend
from mapet_kernels.checks import check_is_tensor
from mapet_kernels.permuted_embed.checks import check, per_channel, without_leading_ones
from mapet_kernels.registration import autocast_dtype

BACKENDS = ("reference", "triton", "cuda")


@functools.cache
def _backend(name: str) -> ModuleType:
    """The backend's module, imported at first use: Triton and the CUDA kernels may not be installed."""
    module = {"triton": "triton_backend", "cuda": "cuda_backend"}.get(name, name)
    return importlib.import_module(f"mapet_kernels.permuted_embed.{module}")


def permuted_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    mask_token: Tensor,
    perm: Tensor,
    cut: int,
    *,
    class_token: Tensor | None = None,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
    target_content: bool = True,
    mask_tokens: bool = True,
    query_stream: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Embed images into the flat token buffer of the pre-training streams, permuted once and for all.

    Per image the content stream has rows A (the first c tokens of the permutation), B (the T = N - c targets, with
    target_content), M (their mask tokens, with mask_tokens); the query stream has rows G (with query_stream), a copy of
    M. MaPeT keeps all of them, PIM is mask_tokens=False, MIM is target_content=False and query_stream=False.

    Args:
        images: (B, 3, S, S), uint8 in [0, 255], which is divided by 255, or floating point, taken as it is.
        weight: patch projection (D, 3, p, p); p divides S and N = (S / p) ** 2, plus 1 with a class token.
        bias: (D,) or None.
        pos_embed: (N, D), in image order, the class token first; or (1, N, D), as timm keeps it.
        mask_token: (D,), or (1, 1, D).
        perm: integers (B, N), each row a permutation of 0 to N - 1; the token at rank r is perm[b, r]. With a class
            token, token 0, perm[:, 0] must be 0. Checked on the CPU. On a GPU and under torch.compile it is not: what
            is no permutation gives wrong numbers.
        cut: c in [1, N - 1].
        class_token: (D,), or (1, 1, D), or None.
        mean, std: per channel (3,), subtracted and divided by after the division by 255; None leaves images be. As
            tensors, or as three numbers each, which every call then copies to the device.
        backend: "auto" (on a GPU triton where it runs, else cuda where it does), "triton", "cuda" (where csrc/ is
            built) or "reference".

    Returns:
        (B * content rows + B * query rows, D) in the dtype of pos_embed: all content streams, then all query streams.
        Under autocast patches are made, and projected, in its dtype.

    Raises:
        ValueError: shapes, devices, cut, permutation or backend do not fit.
        TypeError: dtypes do not fit, or what should be a tensor is none.
    """
    given = {"images": images, "weight": weight, "pos_embed": pos_embed, "mask_token": mask_token, "perm": perm}
    optional = {"bias": bias, "class_token": class_token}
    check_is_tensor(**given, **{key: value for key, value in optional.items() if value is not None})
    pos_embed = without_leading_ones(pos_embed, 2)
    mask_token, class_token = without_leading_ones(mask_token, 1), without_leading_ones(class_token, 1)
    mean, std = per_channel("mean", mean, weight), per_channel("std", std, weight)
    check(images, weight, bias, pos_embed, mask_token, class_token, perm, cut, mean, std)
    dtype = autocast_dtype(weight)
    name = choose_listed_backend(backend, BACKENDS, images.device, dtype, products=False)
    first = int(class_token is not None)
    perm = perm.to(torch.int64)
    patches = perm[:, first:] - first if target_content else perm[:, first:cut] - first
    columns = permuted_patches_op(images, patches.contiguous(), weight.shape[-1], mean, std, dtype, name)
    content = torch.nn.functional.linear(columns, weight.flatten(1), bias)
    return assemble_op(content, pos_embed, mask_token, class_token, perm, cut, mask_tokens, query_stream, name)


@torch.library.custom_op("mapet_kernels::permuted_patches", mutates_args=())
def permuted_patches_op(
    images: Tensor,
    patches: Tensor,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Normalised patches (B, R, 3 * p * p) in `dtype`, gathered by raster index `patches` (B, R). No gradient."""
    return _backend(backend).permuted_patches(images, patches, patch_size, mean, std, dtype)


@permuted_patches_op.register_fake
def _(images, patches, patch_size, mean, std, dtype, backend):
    return images.new_empty(*patches.shape, images.shape[1] * patch_size**2, dtype=dtype)


@torch.library.custom_op("mapet_kernels::assemble_streams", mutates_args=())
def assemble_op(
    content: Tensor,
    pos_embed: Tensor,
    mask_token: Tensor,
    class_token: Tensor | None,
    perm: Tensor,
    cut: int,
    mask_tokens: bool,
    query_stream: bool,
    backend: str,
) -> Tensor:
    """Flat buffer (rows, D) from projected patches (B, R, D) in permuted order, in the dtype of pos_embed."""
    if not 0 <= cut <= perm.shape[1]:
        raise ValueError(f"cut must be in [0, N] = [0, {perm.shape[1]}], got {cut}")
    content = content.to(pos_embed.dtype)
    return _backend(backend).assemble(content, pos_embed, mask_token, class_token, perm, cut, mask_tokens, query_stream)


@assemble_op.register_fake
def _(content, pos_embed, mask_token, class_token, perm, cut, mask_tokens, query_stream, backend):
    batch, ranks, width = content.shape
    targets = perm.shape[1] - cut
    rows = ranks + int(class_token is not None) + targets * (int(mask_tokens) + int(query_stream))
    return pos_embed.new_empty(batch * rows, width)


@torch.library.custom_op("mapet_kernels::assemble_streams_backward", mutates_args=())
def assemble_backward_op(
    d_rows: Tensor,
    perm: Tensor,
    cut: int,
    patches: int,
    class_token: bool,
    mask_tokens: bool,
    query_stream: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of content, pos_embed, mask_token and class_token (empty without one)."""
    return _backend(backend).assemble_backward(d_rows, perm, cut, patches, class_token, mask_tokens, query_stream)


@assemble_backward_op.register_fake
def _(d_rows, perm, cut, patches, class_token, mask_tokens, query_stream, backend):
    batch, tokens = perm.shape
    width = d_rows.shape[1]
    d_content = d_rows.new_empty(batch, patches, width)
    d_class = d_rows.new_empty(width if class_token else 0)
    return d_content, d_rows.new_empty(tokens, width), d_rows.new_empty(width), d_class


def _save(ctx, inputs, output):
    content, _, _, class_token, perm, cut, mask_tokens, query_stream, backend = inputs
    ctx.save_for_backward(perm)
    ctx.content_dtype = content.dtype
    ctx.options = (cut, content.shape[1], class_token is not None, mask_tokens, query_stream, backend)


def _backward(ctx, d_rows):
    (perm,) = ctx.saved_tensors
    d_content, d_pos, d_mask, d_class = assemble_backward_op(d_rows.contiguous(), perm, *ctx.options)
    has_class = ctx.options[2]
    return d_content.to(ctx.content_dtype), d_pos, d_mask, d_class if has_class else None, *(None,) * 5


assemble_op.register_autograd(_backward, setup_context=_save)
