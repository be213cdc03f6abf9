"""Stochastic depth that leaves out the work of dropped images (Huang et al., 2016; batched as in DINOv2).

A residual branch f with drop rate p gives x + f(x) / (1 - p) for an image that is kept and x for one that is dropped.
Instead of multiplying f(x) by 0, the rows of the kept images are taken out of the flat buffer, f sees these only, and
its result is added to them: the same result, since no image sees another, from 1 - p of the work.

Which images are kept is drawn on the host, so that their number, a size of tensors, is known without waiting for the
device. Shape letters: B images, k kept ones, R rows of the buffer, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class Kept(NamedTuple):
    """Images of a micro-batch that one branch keeps.

    Attributes:
        images: int64 (k,) on the model's device, rising; never empty.
        factor: what the branch is multiplied by, 1 / (1 - p); 0 where every image is dropped, and one stands for all,
            so that every weight still has a gradient.
    """

    images: Tensor
    factor: float


def kept_images(keep: Tensor, device: torch.device | str) -> tuple[tuple[Kept | None, Kept | None], ...]:
    """For every block, the images that its two branches keep; None where a branch drops none and scales by 1.

    Args:
        keep: float32 (B, depth, 2) on the host: 0 for a dropped image, else 1 / (1 - p).
        device: where the indices go, all in one copy that the host does not wait for.
    """
    rows = keep.flatten(1).T
    chosen = [row.nonzero().squeeze(1) for row in rows]
    chosen = [images if len(images) else images.new_zeros(1) for images in chosen]
    indices = torch.cat(chosen)
    if torch.device(device).type == "cuda":
        indices = indices.pin_memory()
    parts = indices.to(device, non_blocking=True).split([len(images) for images in chosen])
    kept = [
        None if bool((row == 1).all()) else Kept(part, float(row.max())) for row, part in zip(rows, parts, strict=True)
    ]
    return tuple(zip(kept[::2], kept[1::2], strict=True))


def take(x: Tensor, images: Tensor, groups: tuple[int, ...]) -> Tensor:
    """The rows of k images out of x (R, D): (k * sum(groups), D) in the same order.

    groups: rows of an image in each part of x, such as content and query streams; a part holds all images in turn.
    """
    return _Take.apply(x, images, groups)


def add(x: Tensor, branch: Tensor, kept: Kept, groups: tuple[int, ...]) -> Tensor:
    """x (R, D) with kept.factor * branch (k * sum(groups), D) added to the rows of the kept images."""
    return _Add.apply(x, branch, kept.images, kept.factor, groups)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, images: Tensor, groups: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(images)
        ctx.groups, ctx.rows = groups, x.shape[0]
        return _select(x, images, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (images,) = ctx.saved_tensors
        everywhere = gradient.new_zeros(ctx.rows, gradient.shape[1])
        return _add_to(everywhere, gradient, images, 1.0, ctx.groups), None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, branch: Tensor, images: Tensor, factor: float, groups: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(images)
        ctx.factor, ctx.groups, ctx.dtype = factor, groups, branch.dtype
        return _add_to(x.clone(), branch.to(x.dtype), images, factor, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (images,) = ctx.saved_tensors
        branch = _select(gradient, images, ctx.groups).mul_(ctx.factor).to(ctx.dtype)
        return gradient, branch, None, None, None


def _select(x: Tensor, images: Tensor, groups: tuple[int, ...]) -> Tensor:
    parts = [part.index_select(0, images).view(-1, x.shape[1]) for part in _by_image(x, groups)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _add_to(x: Tensor, branch: Tensor, images: Tensor, factor: float, groups: tuple[int, ...]) -> Tensor:
    """x, changed in place; each image has rows of its own, so that the order of additions is the same every time."""
    for part, values in zip(_by_image(x, groups), _by_image(branch, groups), strict=True):
        part.index_add_(0, images, values, alpha=factor)
    return x


def _by_image(x: Tensor, groups: tuple[int, ...]) -> list[Tensor]:
    """Views (images, numbers of an image) of the parts of x (rows, D)."""
    images = x.shape[0] // sum(groups)
    parts = x.split([images * rows for rows in groups])
    return [part.view(images, -1) for part in parts]
