"""Public k-means update: checks, choice of backend, registration as mapet_kernels::kmeans_update."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from mapet_kernels.backends import choose_listed_backend
from mapet_kernels.checks import check_floating, check_is_tensor

BACKENDS = ("reference", "triton")


@functools.cache
def _backend(name: str) -> ModuleType:
    """The backend's module, imported at first use: Triton may not be installed, and takes its time."""
    return importlib.import_module(f"mapet_kernels.kmeans_update.{name}{'_backend' if name == 'triton' else ''}")


def kmeans_update(
    x: Tensor,
    ids: Tensor,
    clusters: int,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    check_ids: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum and number of the rows of every cluster; the same bits on every call, on the GPU too.

    Args:
        x: (n, D); float16, bfloat16, float32 or float64.
        ids: (n,) int64, each in [0, clusters).
        clusters: how many clusters there are, K.
        out: contiguous sums (K, D), fp32 or float64 (float64 for float64 x), and counts (K,) int64 of earlier chunks of
            rows; those of x are added to both in place. float64 sums over chunks are those over all rows at once, but
            for float64 rounding.
        check_ids: False for ids that are known to be in range, as those of kmeans_assign are: a GPU need not be waited
            for. Others then give wrong sums.
        backend: "auto" (triton on a GPU that runs it, for all but float64), "triton" or "reference": plain torch on any
            device, what V100 and T4 get, where a pass over the rows costs little beside the assignment.

    Returns:
        sums (K, D), float64 for float64 x, else fp32, and counts (K,) int64; zeros for a cluster without rows. With
        out, its tensors. Sums are added up in float64 and rounded once.

    Raises:
        ValueError: shapes that do not fit, an id outside [0, clusters), a backend that is unknown or cannot run here.
        TypeError: x not floating point, ids not int64, or out in a dtype that is not allowed.
    """
    check_is_tensor(x=x, ids=ids)
    check_floating("x", x)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if x.dim() != 2 or ids.shape != x.shape[:1]:
        raise ValueError(f"x must be (n, D) and ids (n,), got {tuple(x.shape)} and {tuple(ids.shape)}")
    if clusters < 1 or x.shape[1] < 1:
        raise ValueError(f"there must be at least one cluster and one feature, got {clusters} and {x.shape[1]}")
    if x.device != ids.device:
        raise ValueError(f"x is on {x.device} and ids on {ids.device}; put both on one device")
    name = choose_listed_backend(backend, BACKENDS, x.device, x.dtype)
    if out is None:
        return _kmeans_update(x.detach(), ids, clusters, check_ids, name)
    _check_out(x, clusters, *out)
    _kmeans_update_add(x.detach(), ids, *out, check_ids, name)
    return out


def _check_out(x: Tensor, clusters: int, sums: Tensor, counts: Tensor) -> None:
    shapes = (clusters, x.shape[1]), (clusters,)
    if (tuple(sums.shape), tuple(counts.shape)) != shapes:
        raise ValueError(f"out must be {shapes[0]} and {shapes[1]}, got {tuple(sums.shape)} and {tuple(counts.shape)}")
    allowed = (torch.float64,) if x.dtype == torch.float64 else (torch.float32, torch.float64)
    if sums.dtype not in allowed or counts.dtype != torch.int64:
        names = " or ".join(map(str, allowed))
        raise TypeError(f"out must be {names} and torch.int64 for {x.dtype} rows, got {sums.dtype} and {counts.dtype}")
    if not sums.is_contiguous() or {sums.device, counts.device} != {x.device}:
        raise ValueError(f"out must be contiguous and on {x.device}, got {sums.device} and {counts.device}")


def _check_ids(ids: Tensor, clusters: int) -> None:
    if ids.numel():
        lowest, highest = (bound.item() for bound in torch.aminmax(ids))
        if lowest < 0 or highest >= clusters:
            raise ValueError(f"ids must be in [0, {clusters}), got values from {lowest} to {highest}")


def _empty_result(x: Tensor, ids: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return x.new_empty((clusters, x.shape[1]), dtype=dtype), ids.new_empty((clusters,))


@torch.library.custom_op("mapet_kernels::kmeans_update", mutates_args=())
def _kmeans_update(x: Tensor, ids: Tensor, clusters: int, check_ids: bool, backend: str) -> tuple[Tensor, Tensor]:
    if check_ids:
        _check_ids(ids, clusters)
    sums, counts = _empty_result(x, ids, clusters)
    _backend(backend).kmeans_update(x, ids, sums, counts, add=False)
    return sums, counts


@_kmeans_update.register_fake
def _(x: Tensor, ids: Tensor, clusters: int, check_ids: bool, backend: str) -> tuple[Tensor, Tensor]:
    return _empty_result(x, ids, clusters)


@torch.library.custom_op("mapet_kernels::kmeans_update_add", mutates_args=("sums", "counts"))
def _kmeans_update_add(x: Tensor, ids: Tensor, sums: Tensor, counts: Tensor, check_ids: bool, backend: str) -> None:
    if check_ids:
        _check_ids(ids, len(counts))
    _backend(backend).kmeans_update(x, ids, sums, counts, add=True)


@_kmeans_update_add.register_fake
def _(x: Tensor, ids: Tensor, sums: Tensor, counts: Tensor, check_ids: bool, backend: str) -> None:
    return None
