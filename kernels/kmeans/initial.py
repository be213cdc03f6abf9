"""Where a k-means starts: distinct random rows, or rows far from each other (k-means++)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mapet_kernels.kmeans.data import Data
from mapet_kernels.precision import full_fp32


def random_rows(data: Data, clusters: int, generator: torch.Generator) -> Tensor:
    """(K, D) distinct random rows."""
    return data.take(torch.randperm(data.rows, generator=generator, device="cpu")[:clusters])


def plus_plus(data: Data, clusters: int, generator: torch.Generator) -> Tensor:
    """(K, D) rows by greedy k-means++ (Arthur and Vassilvitskii 2007, section 3 and the remark that closes it).

    Every next row is the best of 2 + ln K that are drawn in proportion to their squared distance to the rows chosen so
    far. Reads all rows K times, and keeps 2 + ln K numbers for each.
    """
    candidates = data.take(torch.randint(data.rows, (1,), generator=generator, device="cpu"))
    chosen = [candidates[0]]
    distances = Distances(data, origin=candidates[0])
    nearest = distances.to(candidates)[0]
    while len(chosen) < clusters:
        candidates = data.take(draw(data, nearest, 2 + int(math.log(clusters)), generator))
        # (trials, n)
        lowered = distances.to(candidates)
        torch.minimum(lowered, nearest, out=lowered)
        best = int(data.ranks.sum(lowered.sum(1, dtype=torch.float64)).argmin())
        chosen.append(candidates[best])
        nearest = lowered[best].clone()
    return torch.stack(chosen)


class Distances:
    """Squared distances of this process's rows to a few others, good enough to draw by.

    With c' = c - o for a fixed row o, |x - c|^2 = |x - o|^2 - 2 (x - o).c' + |c'|^2, and o.c' is taken off afterwards,
    so that one matrix product reads the rows as they are.
    """

    def __init__(self, data: Data, origin: Tensor) -> None:
        self.data, self.origin = data, origin
        self.squares = torch.empty(data.source.shape[0], dtype=data.working, device=data.device)
        for start, rows in data.chunks():
            self.squares[start : start + len(rows)] = (rows.to(data.working) - origin).square_().sum(1)

    def to(self, candidates: Tensor) -> Tensor:
        """(m, D) -> (m, n), never negative."""
        moved = candidates - self.origin
        constant = (moved.double() * (moved.double() + 2 * self.origin.double())).sum(1).to(self.data.working)
        distances = torch.empty(len(candidates), len(self.squares), dtype=self.data.working, device=self.data.device)
        with full_fp32(self.data.device.type):
            for start, rows in self.data.chunks():
                few = slice(start, start + len(rows))
                # (m, D) @ (D, n) -> (m, n)
                products = moved @ rows.to(self.data.working).T
                distances[:, few] = products.mul_(-2).add_(constant[:, None]).add_(self.squares[few])
        return distances.clamp_(min=0)


def draw(data: Data, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Global numbers (count,) of rows drawn in proportion to weights (n,) of every process's rows; uniformly if all 0.

    The same in all processes.
    """
    steps = weights.cumsum(0, dtype=torch.float64)
    totals = torch.zeros(data.ranks.size, dtype=torch.float64, device=data.device)
    totals[data.ranks.rank] = steps[-1] if len(steps) else 0
    bounds = data.ranks.sum(totals).cumsum(0)
    if bounds[-1] == 0:
        return torch.randint(data.rows, (count,), generator=generator, device="cpu")
    levels = torch.rand(count, dtype=torch.float64, generator=generator, device="cpu").to(data.device) * bounds[-1]
    owners = torch.searchsorted(bounds, levels, right=True).clamp_(max=int(totals.nonzero().max()))
    numbers = torch.zeros(count, dtype=torch.int64, device=data.device)
    own = owners == data.ranks.rank
    if own.any():
        within = levels[own] - (bounds - totals)[data.ranks.rank]
        numbers[own] = data.offset + torch.searchsorted(steps, within, right=True).clamp_(max=len(steps) - 1)
    return data.ranks.sum(numbers).cpu()


INITS: dict[str, Callable[[Data, int, torch.Generator], Tensor]] = {"random": random_rows, "k-means++": plus_plus}
