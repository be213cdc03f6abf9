"""Opening files that somebody else may have put there, and unpickling them without running anything in them."""

from __future__ import annotations

import errno
import io
import os
import pickle
import stat
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | os.PathLike, *, buffering: int = -1) -> BinaryIO:
    """A regular file, or a link to one, open for binary reading.

    OSError for whatever else stands there: a named pipe would wait for a writer for ever, a device may have no end.
    """
    try:
        # Without O_NONBLOCK the opening itself of a named pipe would wait.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind != stat.S_IFREG:
            raise OSError(errno.EINVAL, f"it is {KINDS.get(kind, 'no regular file')}, not a file", os.fspath(path))
        return os.fdopen(descriptor, "rb", buffering=buffering)
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike) -> bytes:
    """All of a regular file; OSError as `open_regular`."""
    with open_regular(Path(path)) as file:
        return file.read()


def load_plain(file: BinaryIO, classes: Sequence[type] = ()) -> Any:
    """What torch.save wrote: tensors, numbers, text, lists and dicts, on the CPU, and nothing that could run.

    Damaged bytes raise nearly any exception.

    Args:
        classes: types, besides those of torch's own list, that may occur; they must be harmless to make.
    """
    start = file.read(2)
    file.seek(0)
    if start == b"PK":
        _check_stored(file)
    else:  # torch's older format; of a real file torch would read parts by itself
        file = io.BytesIO(file.read())
    try:
        with torch.serialization.safe_globals(list(classes)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickles' ways, which end in errors anyway
            value = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text advises to run the code
        raise ValueError("it is damaged, or holds more than tensors, numbers and text, which could run code") from error
    check_backed(value)
    return value


def _check_stored(file: BinaryIO) -> None:
    """ValueError for a zip with compressed members: torch.save compresses nothing, and a bomb would unpack to more."""
    with zipfile.ZipFile(file) as archive:
        if packed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"its member {packed[0]} is compressed, which torch.save never does")
    file.seek(0)


def check_backed(value: Any) -> None:
    """ValueError for a tensor, in nested dicts and lists, that claims more numbers than its storage holds."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise ValueError(f"it holds a tensor of layout {value.layout}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"it claims a tensor {tuple(value.shape)}, but does not hold as many numbers")
    elif isinstance(value, Mapping):
        for part in value.values():
            check_backed(part)
    elif isinstance(value, list | tuple):
        for part in value:
            check_backed(part)
