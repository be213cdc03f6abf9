"""Nearest centroid by the CUDA C++ kernel (csrc/kmeans_assign.cu), which MAPET_BUILD_CUDA=1 builds: V100, T4 and newer.

The kernel makes the lists of candidates; all else is plain torch, so that no Triton is needed (candidates.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapet_kernels import _C  # noqa: F401  (loads the operators)
from mapet_kernels.kmeans_assign import candidates
from mapet_kernels.kmeans_assign.bound import Centroids, Rows
from mapet_kernels.kmeans_assign.candidates import Lists


def kmeans_assign(x: Tensor, centroids: Tensor, exact: bool, return_distance: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest centroid of every row: see `reference.kmeans_assign` for arguments and results.

    Not `exact`: one pass with the operands rounded to float16 as bound.py says.

    Raises:
        ValueError: rows that are not finite (named).
        TypeError: float64.
    """
    return candidates.kmeans_assign(x, centroids, exact, return_distance, _scores)


def _scores(rows: Rows, centroids: Centroids, groups: int, n: int, shares: int, lists: Lists) -> None:
    torch.ops.mapet_kernels.cuda_assign_scores(
        rows.values, rows.scale, rows.radius, centroids.values, centroids.bias, centroids.slope, centroids.slack,
        lists.bounds, lists.ids, lists.reach, groups, n, shares,
    )  # fmt: skip
