"""Rows in .npy files, read by plain reads: nothing is mapped, so a file that shrinks is an error and not a SIGBUS."""

from __future__ import annotations

import ast
import bisect
import ctypes
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mapet_kernels.regular import open_regular

MAGIC = b"\x93NUMPY"
DTYPES = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64}
LONGEST_HEADER = 10_000
BLOCK_BYTES = 256 * 2**10
"""Selected rows within a stretch of this size are read in one go, with what is between them."""


@dataclass(frozen=True)
class NpyFile:
    """One .npy file of shape (rows, features), whose rows begin `offset` bytes into it."""

    path: Path
    dtype: torch.dtype
    rows: int
    features: int
    offset: int


class NpyRows:
    """The rows of .npy files, one after the other in the order given; float16, float32 or float64, C order.

    Files are opened for each read, so there may be many. They must not change while in use.

    Raises:
        OSError: a file cannot be read.
        ValueError: no file, or one, named, that is no such array, is truncated or too long, or differs from the first
            in features or dtype. Also on reading, if a file has been truncated since.
    """

    device = torch.device("cpu")
    resident = False

    def __init__(self, paths: str | os.PathLike | Sequence[str | os.PathLike]) -> None:
        given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not given:
            raise ValueError("no .npy file was given")
        self.files = [open_npy(Path(path)) for path in given]
        first = self.files[0]
        for file in self.files[1:]:
            if (file.dtype, file.features) != (first.dtype, first.features):
                raise ValueError(
                    f"{file.path} holds rows of {file.features} {file.dtype}, but {first.path} rows of "
                    f"{first.features} {first.dtype}"
                )
        self._starts = [0, *itertools.accumulate(file.rows for file in self.files)]
        self.shape, self.dtype = (self._starts[-1], first.features), first.dtype

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        out = torch.empty(stop - start, self.shape[1], dtype=self.dtype, device=self.device) if out is None else out
        done = 0
        while done < stop - start:
            i_file = bisect.bisect_right(self._starts, start + done) - 1
            file, first = self.files[i_file], start + done - self._starts[i_file]
            count = min(file.rows - first, stop - start - done)
            _fill(out[done : done + count], file, first)
            done += count
        return out

    def take(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.empty(len(numbers), self.shape[1], dtype=self.dtype, device=self.device) if out is None else out
        rows_of_a_block = max(1, BLOCK_BYTES // (self.shape[1] * self.dtype.itemsize))
        counts = torch.unique_consecutive(numbers // rows_of_a_block, return_counts=True)[1]
        done = 0
        for count in counts.tolist():
            few = numbers[done : done + count]
            first = int(few[0])
            out[done : done + count] = self.read(first, int(few[-1]) + 1)[few - first]
            done += count
        return out


def open_npy(path: Path) -> NpyFile:
    """Read the header of a .npy file and check its size. Errors as for `NpyRows`."""
    with open_regular(path) as file:
        header = _read_header(path, file)
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    shape, dtype = header["shape"], DTYPES.get(header["descr"])
    if dtype is None or header["fortran_order"] or len(shape) != 2 or shape[1] < 1:
        order = "Fortran" if header["fortran_order"] else "C"
        raise ValueError(
            f"{path} holds {header['descr']} {shape} in {order} order; needed is (rows, features) in C order, of "
            "float16, float32 or float64 (<f2, <f4, <f8)"
        )
    needed = offset + shape[0] * shape[1] * dtype.itemsize
    if size != needed:
        what = "truncated" if size < needed else "too long"
        raise ValueError(f"{path} is {what}: it has {size} bytes, and {shape[0]} rows of {shape[1]} need {needed}")
    return NpyFile(path, dtype, shape[0], shape[1], offset)


def _read_header(path: Path, file: BinaryIO) -> dict:
    """descr, fortran_order and shape; the file is then at its first row."""
    start = file.read(8)
    if start[:6] != MAGIC or start[6:7] not in (b"\1", b"\2", b"\3"):
        raise ValueError(f"{path} is not a .npy file")
    length = int.from_bytes(file.read(2 if start[6] == 1 else 4), "little")
    text = file.read(min(length, LONGEST_HEADER))
    try:
        header = ast.literal_eval(text.decode("latin-1" if start[6] < 3 else "utf-8").strip())
        known = set(header) == {"descr", "fortran_order", "shape"} and isinstance(header["descr"], str)
        if not (known and all(isinstance(n, int) and n >= 0 for n in header["shape"])):
            raise ValueError("unknown fields")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged .npy header") from error
    return header


def _fill(out: Tensor, file: NpyFile, first: int) -> None:
    """Read rows into `out` (m, features), contiguous on the CPU, from row `first` of the file on."""
    size = out.numel() * out.element_size()
    buffer = memoryview((ctypes.c_char * size).from_address(out.data_ptr())).cast("B") if size else b""
    with open_regular(file.path, buffering=0) as opened:
        opened.seek(file.offset + first * file.features * file.dtype.itemsize)
        done = 0
        while done < size:
            got = opened.readinto(buffer[done:])
            if not got:
                raise ValueError(f"{file.path} has been truncated since it was opened: its rows end too early")
            done += got
