"""Sums and counts of clusters in plain torch: sort by cluster, then sum runs of rows. No atomics, no one-hot matrix."""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 * 2**20
"""Largest float64 copy of gathered rows."""


def kmeans_update(x: Tensor, ids: Tensor, sums: Tensor, counts: Tensor, add: bool) -> None:
    """sums[k] = sum of x[i] over ids[i] = k, and how many there are, for checked inputs; on top of both, with `add`.

    x is (n, D) floating point and ids (n,) int64 in [0, K). sums is (K, D), float64 or fp32, and counts (K,) int64.
    Added up in float64 in row order, so the result does not depend on the number of threads, is the same on every call,
    and is off by one rounding to the dtype of sums.
    """
    n, features = x.shape
    total = torch.zeros(sums.shape, dtype=torch.float64, device=x.device)
    ordered_ids, order = torch.sort(ids, stable=True)
    first_rows = torch.searchsorted(ordered_ids, torch.arange(len(counts) + 1, device=x.device))
    rows = max(1, CHUNK_BYTES // (features * torch.float64.itemsize))
    starts = range(0, n, rows)
    stops = [min(start + rows, n) for start in starts]
    lowest = ordered_ids[list(starts)].tolist()
    highest = ordered_ids[[stop - 1 for stop in stops]].tolist()
    for start, stop, low, high in zip(starts, stops, lowest, highest, strict=True):
        values = x[order[start:stop]].double()
        bags = (first_rows[low : high + 1] - start).clamp_(min=0)
        # An embedding bag is a sum over runs of rows, one thread to a run and a feature.
        rows_of_chunk = torch.arange(stop - start, device=x.device)
        total[low : high + 1].add_(F.embedding_bag(rows_of_chunk, values, bags, mode="sum"))
    if add and sums.dtype == total.dtype:
        sums += total
    else:
        sums.copy_(total + sums if add else total)
    counts.copy_(first_rows.diff() + counts if add else first_rows.diff())
