"""Where the rows of a k-means come from: one interface over tensors, files, parts and selections of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mapet_kernels.checks import check_floating
from mapet_kernels.kmeans.npy import NpyRows


@runtime_checkable
class RowSource(Protocol):
    """A matrix (n, D) that is read a few rows at a time, always the same.

    Attributes:
        shape, dtype: of the matrix.
        device: where `read` and `take` leave rows.
        resident: rows are in memory on that device; if not, a thread reads ahead.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    resident: bool

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows [start, stop), into `out` if given; else new, or a view that must not be written to."""

    def take(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        """The rows with these numbers, (m,) int64 on the CPU, ascending; into `out` if given."""


class TensorRows:
    """The rows of a tensor (n, D), on any device; it may be memory-mapped."""

    resident = True

    def __init__(self, values: Tensor) -> None:
        check_floating("x", values)
        if values.dim() != 2 or values.shape[1] == 0:
            raise ValueError(f"x must be (rows, features) with at least one feature, got shape {tuple(values.shape)}")
        self.values = values.detach()
        self.shape, self.dtype, self.device = tuple(values.shape), values.dtype, values.device

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        rows = self.values[start:stop]
        return rows if out is None else out.copy_(rows)

    def take(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        rows = self.values[numbers.to(self.device)]
        return rows if out is None else out.copy_(rows)


class Part:
    """Rows [start, stop) of a source."""

    def __init__(self, source: RowSource, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= source.shape[0]:
            raise ValueError(f"rows [{start}, {stop}) are not a part of {source.shape[0]} rows")
        self.source, self.start = source, start
        self.shape = (stop - start, source.shape[1])
        self.dtype, self.device, self.resident = source.dtype, source.device, source.resident

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        return self.source.read(self.start + start, self.start + stop, out)

    def take(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        return self.source.take(numbers + self.start, out)


class Selection:
    """The rows of a source with the given numbers, (m,) int64 on the CPU, ascending."""

    def __init__(self, source: RowSource, numbers: Tensor) -> None:
        self.source, self.numbers = source, numbers
        self.shape = (len(numbers), source.shape[1])
        self.dtype, self.device, self.resident = source.dtype, source.device, source.resident

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        return self.source.take(self.numbers[start:stop], out)

    def take(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        return self.source.take(self.numbers[numbers], out)


def share_of_rows(source: RowSource, rank: int, size: int) -> Part:
    """The part of the rows that process `rank` of `size` holds: contiguous, in the order of the ranks."""
    if not 0 <= rank < size:
        raise ValueError(f"rank must be in [0, {size}), got {rank}")
    rows = source.shape[0]
    return Part(source, rows * rank // size, rows * (rank + 1) // size)


def as_source(x: Tensor | RowSource | str | os.PathLike | Sequence[str | os.PathLike]) -> RowSource:
    """A source for whatever `fit` is given: a tensor, a source, or one or several .npy files."""
    if isinstance(x, Tensor):
        return TensorRows(x)
    if isinstance(x, RowSource):
        return x
    if isinstance(x, (str, os.PathLike)):
        return NpyRows([x])
    if isinstance(x, (list, tuple)) and all(isinstance(path, (str, os.PathLike)) for path in x):
        return NpyRows(x)
    raise TypeError(
        f"x must be a tensor, a source of rows, a .npy file or a list of them, got {type(x).__name__}; "
        "torch.from_numpy makes a tensor of an array, also of a memory-mapped one"
    )
