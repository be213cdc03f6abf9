"""Public k-means assignment: checks, choice of backend, registration as mapet_kernels::kmeans_assign."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from mapet_kernels.backends import choose_listed_backend
from mapet_kernels.checks import check_floating, check_is_tensor

BACKENDS = ("reference", "triton", "cuda")


@functools.cache
def _backend(name: str) -> ModuleType:
    """The backend's module, imported at first use: Triton may not be installed, and takes its time."""
    return importlib.import_module(f"mapet_kernels.kmeans_assign.{name}{'' if name == 'reference' else '_backend'}")


def kmeans_assign(
    x: Tensor,
    centroids: Tensor,
    *,
    exact: bool = True,
    return_distance: bool = False,
    return_redecided: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """The id of the nearest centroid (squared L2) of every row; ties go to the lowest id.

    Args:
        x: (n, D), or (G, n, D) for G problems at once; float16, bfloat16, float32 or float64.
        centroids: (K, D), or (G, K, D); any of the same dtypes. The work is float64 if either input is, else fp32.
        exact: the id equals the float64 argmin of sum((x - c)^2) wherever the two best are not tied to float64
            rounding; TF32 and autocast are off. False: one pass, near ties as they fall, with "reference" in the
            working dtype, fp32 products as the caller's TF32 setting has them, with "triton" and "cuda" in 16 bits.
        return_distance: also give the squared distance to that centroid, computed from the differences.
        return_redecided: also give how many rows the first pass could not decide and float64 (or fp32 with a proven
            bound) did: (2,) int64, among a few candidates and among all centroids. Divided by n, the share of rows.
        backend: "auto" (for all but float64 triton on a GPU that runs it, cuda on one that does not, V100 or T4, where
            the CUDA C++ kernels are built), "triton", "cuda" or "reference".

    Returns:
        ids int64 (n,) or (G, n); with return_distance also the distances, fp32 or float64, of the same shape; with
        return_redecided also the counts. None carries a gradient.

    Raises:
        ValueError: shapes that do not fit, no centroid, no feature, rows that are not finite (named), a backend that is
            unknown or cannot run here.
        TypeError: what is no tensor, a dtype that is not floating point.
    """
    check_is_tensor(x=x, centroids=centroids)
    check_floating("x", x)
    check_floating("centroids", centroids)
    if x.dim() not in (2, 3) or centroids.dim() != x.dim():
        raise ValueError(
            f"x and centroids must be (n, D) and (K, D), or (G, n, D) and (G, K, D); "
            f"got {tuple(x.shape)} and {tuple(centroids.shape)}"
        )
    if x.shape[-1] != centroids.shape[-1] or x.shape[:-2] != centroids.shape[:-2]:
        raise ValueError(f"x {tuple(x.shape)} and centroids {tuple(centroids.shape)} differ in features or in groups")
    if centroids.shape[-2] == 0 or centroids.shape[-1] == 0:
        raise ValueError(f"centroids must hold at least one row and one feature, got shape {tuple(centroids.shape)}")
    if x.device != centroids.device:
        raise ValueError(f"x is on {x.device} and centroids on {centroids.device}; put both on one device")
    dtype = torch.promote_types(x.dtype, centroids.dtype)
    name = choose_listed_backend(backend, BACKENDS, x.device, dtype)
    ids, distances, again = _kmeans_assign(x.detach(), centroids.detach(), exact, return_distance, name)
    wanted = (ids, *(distances,) * return_distance, *(again,) * return_redecided)
    return wanted if len(wanted) > 1 else ids


@torch.library.custom_op("mapet_kernels::kmeans_assign", mutates_args=())
def _kmeans_assign(
    x: Tensor, centroids: Tensor, exact: bool, return_distance: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _backend(backend).kmeans_assign(x, centroids, exact, return_distance)


@_kmeans_assign.register_fake
def _(x: Tensor, centroids: Tensor, exact: bool, return_distance: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if torch.float64 in (x.dtype, centroids.dtype) else torch.float32
    ids = x.new_empty(x.shape[:-1], dtype=torch.int64)
    return ids, x.new_empty(x.shape[:-1] if return_distance else (0,), dtype=dtype), ids.new_empty(2)
