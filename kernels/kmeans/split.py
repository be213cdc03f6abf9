"""Empty clusters, refilled as the faiss library does: with half of a large cluster."""

from __future__ import annotations

import torch
from torch import Tensor

SPLIT = 1 / 1024
"""Relative push that separates the two copies of a split centroid."""


def split_empty(centroids: Tensor, counts: Tensor, generator: torch.Generator) -> int:
    """Refill, in place, every empty cluster with half of another; returns how many were empty.

    The cluster to split is picked by cycling through them, accepting one of n_j rows with probability
    (n_j - 1) / (n - K). centroids is (K, D), counts (K,).
    """
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty:
        return 0
    sizes = counts.tolist()
    spare = max(sum(sizes) - len(sizes), 1)
    push = torch.full_like(centroids[0], 1 + SPLIT)
    push[1::2] = 1 - SPLIT
    for i_empty in empty:
        i_split = pick_cluster(sizes, spare, generator)
        centroids[i_empty] = centroids[i_split] * push
        centroids[i_split] *= 2 - push
        sizes[i_empty] = sizes[i_split] // 2
        sizes[i_split] -= sizes[i_empty]
    return len(empty)


def pick_cluster(sizes: list[int], spare: int, generator: torch.Generator) -> int:
    """The first cluster to accept, going round from cluster 0; a whole round is drawn at once."""
    chances = (torch.tensor(sizes, device="cpu") - 1) / spare
    while True:
        accepted = (torch.rand(len(sizes), generator=generator, device="cpu") < chances).nonzero()
        if len(accepted):
            return int(accepted[0])
