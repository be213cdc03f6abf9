"""The rows of one fit over all its processes: read in chunks, gathered by global number, checked once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mapet_kernels.checks import all_finite, not_finite
from mapet_kernels.kmeans.ranks import Ranks
from mapet_kernels.kmeans.sources import RowSource, Selection, TensorRows
from mapet_kernels.kmeans.stream import chunks

KEPT_CHUNKS = 4
"""A subset of no more rows than this many chunks is read once and kept on the working device."""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Data:
    """The rows of all processes, numbered in the order of the ranks; this process reads its own share.

    Attributes:
        shares: rows of every process.
        rows, features: of the whole matrix.
        chunk_rows: worked on at once.
        offset: global number of this process's first row.
        working: dtype of centroids and distances; float64 for float64 rows, else float32.
    """

    def __init__(self, source: RowSource, ranks: Ranks, device: torch.device, chunk_rows: int) -> None:
        self.source, self.ranks, self.device, self.chunk_rows = source, ranks, device, chunk_rows
        kinds = ranks.gather((source.shape[0], source.shape[1], str(source.dtype)))
        if len({kind[1:] for kind in kinds}) > 1:
            listed = ", ".join(f"{features} {dtype}" for _, features, dtype in kinds)
            raise ValueError(f"all processes must hold rows of the same features and dtype, got {listed}")
        self.shares = [kind[0] for kind in kinds]
        self.rows, self.features = sum(self.shares), source.shape[1]
        self.offset = sum(self.shares[: ranks.rank])
        self.working = torch.float64 if source.dtype == torch.float64 else torch.float32

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Number within the share, and rows, of every chunk of this process's share."""
        yield from chunks(self.source, self.device, self.chunk_rows)

    def take(self, numbers: Tensor) -> Tensor:
        """The rows with these global numbers, (m,) int64 on the CPU in any order; (m, D), the same in all processes."""
        rows = torch.zeros(len(numbers), self.features, dtype=self.working, device=self.device)
        own = numbers - self.offset
        here = ((own >= 0) & (own < self.source.shape[0])).nonzero().flatten()
        if len(here):
            here = here[own[here].argsort()]
            rows[here.to(self.device)] = self.source.take(own[here]).to(self.device, self.working)
        return self.ranks.sum(rows)

    def subset(self, count: int, seed: int) -> Data:
        """Exactly `count` rows drawn from all by the seed, or all where there are no more."""
        if self.rows <= count:
            return self._kept(self.source)
        drawn = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed), device="cpu")[:count]
        own = drawn[(drawn >= self.offset) & (drawn < self.offset + self.source.shape[0])] - self.offset
        return self._kept(Selection(self.source, own.sort().values))

    def check(self, checksum: bool) -> str:
        """Read everything once: ValueError naming rows with NaN or infinity; returns the checksum of all bits.

        The checksum does not depend on chunks, devices or the number of processes. It is for noticing other data, not
        for security; empty if not wanted.
        """
        bad, first, total = 0, [], torch.zeros((), dtype=torch.int64, device=self.device)
        for start, chunk in self.chunks():
            if not all_finite(chunk):
                rows = (~torch.linalg.vector_norm(chunk, ord=math.inf, dim=1).isfinite()).nonzero().flatten()
                bad, first = bad + len(rows), [*first, *(rows[:5] + self.offset + start).tolist()]
            if checksum:
                total += _checksum(chunk, self.offset + start)
        self.ranks.together(lambda: _raise_if_bad(bad, first))
        return f"{self.ranks.sum(total).item() & (2**64 - 1):016x}" if checksum else ""

    def _kept(self, source: RowSource) -> Data:
        here = source.resident and source.device == self.device and not isinstance(source, Selection)
        if not here and source.shape[0] <= KEPT_CHUNKS * self.chunk_rows:
            source = TensorRows(source.read(0, source.shape[0]).to(self.device))
        return Data(source, self.ranks, self.device, self.chunk_rows)


def _raise_if_bad(count: int, first: list[int]) -> None:
    if count:
        raise ValueError(not_finite("x", count, first))


def _checksum(rows: Tensor, first: int) -> Tensor:
    """Sum of the bits of rows (n, D), weighted by column and by global row number, modulo 2^64."""
    bits = rows.contiguous().view(INTEGERS[rows.element_size()]).long()
    columns = 2 * torch.arange(rows.shape[1], device=rows.device) + 1
    numbers = 2 * torch.arange(first, first + len(rows), device=rows.device) + 1
    return ((bits * columns).sum(1) * numbers).sum()
