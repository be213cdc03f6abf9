"""Checks of what callers give to permuted_embed; every text says what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mapet_kernels.checks import check_is_tensor, check_tensors, is_integer, type_name


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
    if not isinstance(cut, int | torch.SymInt) or isinstance(cut, bool):
        raise TypeError(f"cut must be an int, got {type_name(cut)} {cut}")
    if not 1 <= cut <= tokens - 1:
        raise ValueError(f"cut must be in [1, N - 1] = [1, {tokens - 1}], got {cut}")
    check_permutation(perm, class_token is not None)


def _check_dtypes(images: Tensor, weight: Tensor, bias: Tensor | None, added: dict[str, Tensor | None]) -> None:
    if not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    check_tensors(weight=weight, **({} if bias is None else {"bias": bias}))
    dtypes = {name: tensor.dtype for name, tensor in added.items() if tensor is not None}
    if len(set(dtypes.values())) > 1 or not all(dtype.is_floating_point for dtype in dtypes.values()):
        given = ", ".join(map(str, dtypes.values()))
        raise TypeError(f"{', '.join(dtypes)} must share one floating-point dtype, got {given}")


def check_permutation(perm: Tensor, class_token: bool) -> None:
    """Raise ValueError, naming image and value, unless every row of perm (B, N) is a permutation of 0 to N - 1.

    With a class token it must begin with 0. Values are read on the CPU only, where that is free: on a GPU it would wait
    for the device, and under tracing, also on fake tensors, there are none.
    """
    if perm.device.type != "cpu" or torch.compiler.is_compiling() or type(perm) is not Tensor:
        return
    tokens = perm.shape[1]
    wanted = f"every row of perm must hold each of 0 to N - 1 = {tokens - 1} once"
    outside = (perm < 0) | (perm >= tokens)
    if outside.any():
        image, rank = outside.nonzero()[0].tolist()
        raise ValueError(f"{wanted}, but image {image} has {perm[image, rank]} at rank {rank}")
    seen = torch.zeros_like(outside).scatter_(1, perm.long(), True)
    if not seen.all():
        image = int(seen.all(1).logical_not().nonzero()[0])
        value = int(torch.bincount(perm[image].long()).argmax())
        raise ValueError(f"{wanted}, but image {image} has {value} more than once")
    if class_token and perm[:, 0].any():
        image = int(perm[:, 0].nonzero()[0])
        raise ValueError(f"perm[:, 0] must be 0, the class token, but image {image} begins with {perm[image, 0]}")


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
