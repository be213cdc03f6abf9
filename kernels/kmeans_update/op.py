"""Public k-means update: checks, choice of backend, registration as mapet_kernels::kmeans_update."""

import torch
from torch import Tensor

from mapet_kernels.backends import choose_listed_backend
from mapet_kernels.checks import check_floating
from mapet_kernels.kmeans_update import reference

BACKENDS = {"reference": reference}


def kmeans_update(x: Tensor, ids: Tensor, clusters: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Sum and number of the rows of every cluster; the same bits on every call, on the GPU too.

    Args:
        x: (n, D); float16, bfloat16, float32 or float64.
        ids: (n,) int64, each in [0, clusters).
        clusters: how many clusters there are, K.
        backend: "auto" or "reference".

    Returns:
        sums (K, D), float64 for float64 x, else fp32, and counts (K,) int64; zeros for a cluster without rows.

    Raises:
        ValueError: shapes that do not fit, an id outside [0, clusters), unknown backend.
        TypeError: x not floating point, or ids not int64.
    """
    check_floating("x", x)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if x.dim() != 2 or ids.shape != x.shape[:1]:
        raise ValueError(f"x must be (n, D) and ids (n,), got {tuple(x.shape)} and {tuple(ids.shape)}")
    if clusters < 1 or x.shape[1] < 1:
        raise ValueError(f"there must be at least one cluster and one feature, got {clusters} and {x.shape[1]}")
    if x.device != ids.device:
        raise ValueError(f"x is on {x.device} and ids on {ids.device}; put both on one device")
    return _kmeans_update(x.detach(), ids, clusters, choose_listed_backend(backend, BACKENDS))


@torch.library.custom_op("mapet_kernels::kmeans_update", mutates_args=())
def _kmeans_update(x: Tensor, ids: Tensor, clusters: int, backend: str) -> tuple[Tensor, Tensor]:
    if ids.numel():
        lowest, highest = (bound.item() for bound in torch.aminmax(ids))
        if lowest < 0 or highest >= clusters:
            raise ValueError(f"ids must be in [0, {clusters}), got values from {lowest} to {highest}")
    return BACKENDS[backend].kmeans_update(x, ids, clusters)


@_kmeans_update.register_fake
def _(x: Tensor, ids: Tensor, clusters: int, backend: str) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return x.new_empty((clusters, x.shape[1]), dtype=dtype), ids.new_empty((clusters,))
