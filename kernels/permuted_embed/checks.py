"""Checks of what callers give to permuted_embed; every text says what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mapet_kernels.checks import (
    check_integer,
    check_is_tensor,
    check_permutations,
    check_tensors,
    is_integer,
    is_readable,
)


def check(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    mask_token: Tensor,
    class_token: Tensor | None,
    perm: Tensor,
    cut: int,
    mean: Tensor | None,
    std: Tensor | None,
) -> None:
    """Raise ValueError or TypeError unless these arguments fit each other. See `permuted_embed` for what is allowed."""
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be (B, 3, S, S), got {tuple(images.shape)}")
    if weight.dim() != 4 or weight.shape[1] != 3 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must be (D, 3, p, p), got {tuple(weight.shape)}")
    size, patch, width = images.shape[2], weight.shape[2], weight.shape[0]
    if size % patch:
        raise ValueError(f"image size {size} is not divisible by the patch size {patch}")
    tokens = (size // patch) ** 2 + int(class_token is not None)
    expected = {
        "bias": (bias, (width,)),
        "pos_embed": (pos_embed, (tokens, width)),
        "mask_token": (mask_token, (width,)),
        "class_token": (class_token, (width,)),
        "perm": (perm, (images.shape[0], tokens)),
        "mean": (mean, (3,)),
        "std": (std, (3,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} for these images and weights, got {tuple(tensor.shape)}")
    if (mean is None) != (std is None):
        raise ValueError("give both mean and std, or neither")
    _check_dtypes(images, weight, bias, {"pos_embed": pos_embed, "mask_token": mask_token, "class_token": class_token})
    if not is_integer(perm):
        raise TypeError(f"perm must be integers, got {perm.dtype}")
    for name, tensor in {"weight": weight, **{name: tensor for name, (tensor, _) in expected.items()}}.items():
        if tensor is not None and tensor.device != images.device:
            raise ValueError(f"{name} is on {tensor.device} and images on {images.device}; put all on one device")
    check_integer("cut", cut)
    if not 1 <= cut <= tokens - 1:
        raise ValueError(f"cut must be in [1, N - 1] = [1, {tokens - 1}], got {cut}")
    if std is not None and is_readable(std) and not bool((std > 0).all()):
        raise ValueError(f"std must be > 0, got {std.tolist()}")
    check_permutations("perm", perm)
    if class_token is not None and is_readable(perm) and perm[:, 0].any():
        image = int(perm[:, 0].nonzero()[0])
        raise ValueError(f"perm[:, 0] must be 0, the class token, but image {image} begins with {perm[image, 0]}")


def _check_dtypes(images: Tensor, weight: Tensor, bias: Tensor | None, added: dict[str, Tensor | None]) -> None:
    if not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    check_tensors(weight=weight, **({} if bias is None else {"bias": bias}))
    dtypes = {name: tensor.dtype for name, tensor in added.items() if tensor is not None}
    if len(set(dtypes.values())) > 1 or not all(dtype.is_floating_point for dtype in dtypes.values()):
        given = ", ".join(map(str, dtypes.values()))
        raise TypeError(f"{', '.join(dtypes)} must share one floating-point dtype, got {given}")


def without_leading_ones(x: Tensor | None, dimensions: int) -> Tensor | None:
    """x without the leading dimensions of size 1 that are more than so many: timm keeps (1, N, D) and (1, 1, D)."""
    while x is not None and x.dim() > dimensions and x.shape[0] == 1:
        x = x.squeeze(0)
    return x


def per_channel(name: str, values: Tensor | Sequence[float] | None, like: Tensor) -> Tensor | None:
    """`mean` or `std` as a tensor on the device of `like`, in at least float32.

    Raises TypeError for what is neither a tensor nor a sequence of numbers.
    """
    if values is None or isinstance(values, Tensor):
        return values
    if not isinstance(values, Sequence) or not all(isinstance(value, int | float) for value in values):
        check_is_tensor(**{name: values})
    return torch.tensor(values, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
