""".npy files that are written by appending and read by mapping: no pickles, no memory-mapped writes.

A memory-mapped write to a full disk kills the process with SIGBUS; a plain write raises an error that can be handled.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated

import numpy as np

from mapet.checked import at_least
from mapet.files import sha256_of


@dataclass(frozen=True)
class FileRecord:
    """What a manifest remembers of a file."""

    bytes: Annotated[int, at_least(0)]
    sha256: str

    @classmethod
    def of(cls, path: Path, expected: FileRecord | None = None) -> FileRecord:
        """Size and hash of a file as it is on disk; one larger than expected is not hashed. UnreadableFile."""
        return cls(*sha256_of(path, most=expected and expected.bytes))


class NpyAppender:
    """One .npy file of shape (rows, *row_shape) that grows row by row; `close` completes it."""

    def __init__(self, path: Path, dtype: np.dtype | type, row_shape: tuple[int, ...]) -> None:
        self.path, self.dtype, self.row_shape, self.rows = path, np.dtype(dtype), row_shape, 0
        self._file = open_new(path)
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        """Write (b, *row_shape) rows of the file's dtype."""
        if rows.dtype != self.dtype or rows.shape[1:] != self.row_shape:
            raise ValueError(f"rows are {rows.dtype} {rows.shape[1:]}, the file holds {self.dtype} {self.row_shape}")
        self._file.write(memoryview(np.ascontiguousarray(rows)).cast("B") if rows.size else b"")
        self.rows += len(rows)

    def close(self) -> FileRecord:
        """Put the final number of rows into the header, and the file safely on disk."""
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileRecord.of(self.path)

    def _write_header(self) -> None:
        # numpy pads the header so that a longer first axis does not change its length
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.rows, *self.row_shape)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> NpyAppender:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        discard(self._file)


def open_new(path: Path):
    """A new file, open for binary writing."""
    return open(path, "xb")


def discard(file) -> None:
    """Close a file whose content no longer matters; on a full disk flushing it would fail once more."""
    try:
        file.close()
    except OSError:
        file.raw.close()
