"""The one place that reads files which others may have written, damaged or made up, and that writes files whole.

Only regular files are read. No code in a file is run: pickles are read with weights_only=True, and never otherwise, by
us or by a library on our behalf. Whatever is wrong with a file is an `UnreadableFile`: one line with its path and the
reason. What the content means is checked by those who ask for it, with `mapet.checked`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mapet.checked import conform
from mapet.errors import DataError
from mapet_kernels.regular import open_regular, read_regular

T = TypeVar("T")
Shape = tuple[int, ...]
LONGEST_REASON = 300


class UnreadableFile(DataError):
    """A file that is missing, damaged, no regular file, or that holds something else than it should.

    Attributes:
        path: of the file.
        reason: what is wrong, in one line.
        missing: whether nothing stands there at all.
    """

    def __init__(self, path: str | os.PathLike, reason: str, *, advice: str = "", missing: bool = False) -> None:
        self.path, self.reason, self.missing = Path(path), one_line(reason), missing
        super().__init__(f"cannot read {path}: {self.reason}" + (f"; {advice}" if advice else ""))


def one_line(text: object) -> str:
    """The first line of a text, not endlessly long."""
    line = (str(text).strip().splitlines() or [""])[0]
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]} ..."


def unreadable(path: str | os.PathLike, error: BaseException, advice: str = "") -> UnreadableFile:
    """What went wrong while reading a file, as one of its own kind."""
    missing = isinstance(error, FileNotFoundError)
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
    elif isinstance(error, pickle.UnpicklingError):
        reason = "it holds more than tensors, numbers and text, so that it could run code"
    elif isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    elif isinstance(error, MemoryError):
        reason = "it claims more than fits into memory"
    else:
        reason = one_line(error) or type(error).__name__
    return UnreadableFile(path, reason, advice=advice, missing=missing)


def read_bytes(path: str | os.PathLike, *, advice: str = "") -> bytes:
    """All of a file. UnreadableFile, as everywhere below, says what is wrong and gives the advice."""
    try:
        return read_regular(path)
    except (OSError, MemoryError) as error:
        raise unreadable(path, error, advice) from error


def read_json(path: str | os.PathLike, *, advice: str = "") -> Any:
    """The values in a JSON file."""
    content = read_bytes(path, advice=advice)
    try:
        return json.loads(content)
    except (ValueError, RecursionError, MemoryError) as error:
        raise unreadable(path, error, advice) from error


def read_record(path: str | os.PathLike, kind: type[T], *, advice: str = "") -> T:
    """A JSON file as a dataclass, or another type that `mapet.checked.conform` knows: names, types and ranges fit."""
    values = read_json(path, advice=advice)
    try:
        return conform(kind, values, "its content")
    except (ValueError, RecursionError) as error:
        raise unreadable(path, error, advice) from error


def sha256_of(path: str | os.PathLike, *, advice: str = "") -> tuple[int, str]:
    """Bytes of a file, and their SHA-256 as hexadecimal text."""
    try:
        with open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest
    except OSError as error:
        raise unreadable(path, error, advice) from error


def read_tensors(
    path: str | os.PathLike, shapes: Mapping[str, Shape] | None = None, *, floating: bool = False, advice: str = ""
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Args:
        shapes: names and shapes that must be there, and no others; any where it is None. Compared with the file's
            header before a tensor is read.
        floating: whether all must be of floating point.
    """
    try:
        with _tensors_in(path) as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
            if shapes is not None:
                check_shapes({name: tuple(part.get_shape()) for name, part in found.items()}, shapes)
            kinds = {name: part.get_dtype() for name, part in found.items()}
            if floating and (other := [name for name, kind in kinds.items() if not kind.startswith(("F", "BF"))]):
                raise ValueError(f"{other[0]} is {kinds[other[0]]}, must be of floating point")
            return {name: file.get_tensor(name) for name in found}
    except (OSError, SafetensorError, ValueError, MemoryError, RuntimeError) as error:
        raise unreadable(path, error, advice) from error


@contextmanager
def _tensors_in(path: str | os.PathLike) -> Iterator[safe_open]:
    """A safetensors file, open; the library takes no name that is not UTF-8, but finds the file by its descriptor."""
    with open_regular(path) as opened:
        name = os.fspath(path)
        readable = os.fsencode(name).decode("utf-8", "replace") == name
        with safe_open(name if readable else f"/dev/fd/{opened.fileno()}", framework="pt") as file:
            yield file


def tensors_metadata(path: str | os.PathLike, *, advice: str = "") -> dict[str, str]:
    """The texts in the header of a safetensors file."""
    try:
        with _tensors_in(path) as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError, MemoryError) as error:
        raise unreadable(path, error, advice) from error


def check_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    """ValueError naming tensors that are missing, have no place, or have another shape."""
    missing, foreign = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    other = [f"{name} is {found[name]}, must be {wanted[name]}" for name in wanted if found.get(name) != wanted[name]]
    for names, text in ((missing, "it lacks"), (foreign, "it holds, and has no place for,")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{text} {', '.join(sorted(names)[:3])}{more}")
    if other:
        raise ValueError("; ".join(other[:3]))


def read_pickle(path: str | os.PathLike, *, classes: Sequence[type] = (), advice: str = "") -> Any:
    """What torch.save wrote: tensors, numbers, text, lists and dicts, on the CPU, and nothing that could run.

    Args:
        classes: types, besides those of torch's own list, that may occur; they must be harmless to make.
    """
    return unpickled(read_bytes(path, advice=advice), path, classes=classes, advice=advice)


def unpickled(
    content: bytes | memoryview, path: str | os.PathLike, *, classes: Sequence[type] = (), advice: str = ""
) -> Any:
    """As `read_pickle`, of a file that has been read; `path` is for the error."""
    try:
        check_stored(content)
        with torch.serialization.safe_globals(list(classes)):
            value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        check_backed(value)
        return value
    except Exception as error:  # damaged bytes fail in as many ways as there are bytes; no code was run
        raise unreadable(path, error, advice) from error


def check_stored(content: bytes | memoryview) -> None:
    """ValueError for a zip with compressed members: torch.save compresses nothing, and a bomb would unpack to more."""
    if bytes(content[:2]) != b"PK":
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if packed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"its member {packed[0]} is compressed, which torch.save never does")


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


def map_array(
    path: str | os.PathLike,
    dtype: np.dtype | type | None = None,
    shape: Shape | None = None,
    *,
    advice: str = "",
) -> np.ndarray:
    """A .npy file, mapped read-only; of this dtype and shape where they are given. Objects are never unpickled."""
    try:
        open_regular(path).close()
        # open_memmap refuses object arrays
        array = np.lib.format.open_memmap(path, mode="r")
    # the header is Python source, so that damaged ones raise what its parser raises
    except (OSError, ValueError, TypeError, SyntaxError, EOFError, OverflowError, RecursionError, MemoryError) as error:
        raise unreadable(path, error, advice) from error
    wanted = (array.dtype if dtype is None else np.dtype(dtype), array.shape if shape is None else shape)
    if (array.dtype, array.shape) != wanted:
        raise UnreadableFile(
            path, f"it holds {array.dtype} {array.shape}, expected {wanted[0]} {wanted[1]}", advice=advice
        )
    return array.view(np.ndarray)


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file safely to disk, whole or not at all; text as UTF-8, other bytes in names escaped. OSError."""
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write, whose file then takes the place of `path`, safely on the disk, unless the block fails. OSError.

    A file that a killed process left half-written is written again by the next call for the same path.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_through(path: Path, content: bytes | memoryview) -> None:
    """Write a file and wait until it is on the disk. OSError."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Put the names in a folder safely on disk, where the system knows how to."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
