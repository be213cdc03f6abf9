"""Sums and counts of clusters on a GPU: a stable sort by cluster, then sums over runs of rows in float64."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mapet_kernels.backends import INTERPRETED
from mapet_kernels.kmeans_update import kernel
from mapet_kernels.triton_launch import Launch

PIECE = 512
"""Rows of a cluster that one program adds up."""

STEP = 16
"""Rows read at a time."""


def kmeans_update(x: Tensor, ids: Tensor, sums: Tensor, counts: Tensor, add: bool) -> None:
    """See reference.kmeans_update. sums is contiguous.

    The same bits on every call, as the order of additions follows from ids alone; besides x it takes 12 bytes a row for
    the order and, for clusters of more than PIECE rows, 8 D bytes for every PIECE rows.

    Raises:
        ValueError: bfloat16 in the interpreter, which computes it wrongly.
    """
    if INTERPRETED and x.dtype == torch.bfloat16:
        raise ValueError("backend 'triton' under TRITON_INTERPRET=1 is wrong in bfloat16: use float16 or float32")
    ordered_ids, order = torch.sort(ids.to(torch.int32), stable=True)
    bounds = torch.arange(len(counts) + 1, device=x.device, dtype=torch.int32)
    first = torch.searchsorted(ordered_ids, bounds)
    if add:
        counts += first.diff()
    else:
        torch.diff(first, out=counts)
    for part in sums_launches(x, order, ordered_ids, first, sums, add):
        part.run(x.device)


def sums_launches(
    x: Tensor, order: Tensor, ordered_ids: Tensor, first: Tensor, sums: Tensor, add: bool
) -> tuple[Launch, ...]:
    """The launches that fill `sums`, in order: the later pieces of long clusters, if one can be long, then all."""
    n, features = x.shape
    block = min(128, max(16, triton.next_power_of_2(features)))
    blocks, slots = triton.cdiv(features, block), max(0, n - 1) // PIECE
    partial = torch.empty(slots, features, dtype=torch.float64, device=x.device)
    constants = {"PIECE": PIECE, "R": STEP, "BD": block, "num_warps": 4}
    sizes = (*x.stride(), features, blocks)
    later = Launch(
        kernel.partial_sums_kernel,
        slots * blocks,
        (x, order, ordered_ids, first, partial, *sizes, len(sums)),
        constants,
    )
    all_sums = Launch(
        kernel.sums_kernel, len(sums) * blocks, (x, order, first, partial, sums, *sizes), constants | {"ADD": add}
    )
    return (later, all_sums) if slots else (all_sums,)
