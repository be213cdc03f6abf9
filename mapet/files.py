"""The one place that reads files which others may have written, damaged or made up, and that writes them whole.

Only regular files are read. No code in a file is run: pickles are read with weights_only=True, and never otherwise, by
us or by a library on our behalf. Whatever is wrong with a file is an `UnreadableFile`: one line with its path and the
reason. What the content means is checked by those who ask for it, with `mapet.checked`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedWriter
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from torch import Tensor

from mapet.checked import at_least, conform, shown
from mapet.errors import DataError
from mapet_kernels.regular import load_plain, open_regular, read_regular

T = TypeVar("T")
Shape = tuple[int, ...]
LONGEST_REASON = 300
MOST_TENSORS = 4096


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
    if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        reason, advice = error.strerror or str(error), ""  # nothing is wrong with the file
    elif isinstance(error, OSError):
        reason = error.strerror or str(error)
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
    return parsed_json(read_bytes(path, advice=advice), path, advice=advice)


def parsed_json(content: str | bytes, path: str | os.PathLike, *, advice: str = "") -> Any:
    """The values in JSON that was found in a file."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError, MemoryError) as error:
        raise unreadable(path, error, advice) from error


def read_record(path: str | os.PathLike, kind: type[T], *, version: int | None = None, advice: str = "") -> T:
    """A JSON file as a dataclass, or another type that `mapet.checked.conform` knows: names, types and ranges fit.

    Args:
        version: what its entry "format" must be, where it is given; looked at first.
    """
    values = read_json(path, advice=advice)
    try:
        if version is not None and (found := conform(dict[str, Any], values, "its content").get("format")) != version:
            raise ValueError(f"it has format {shown(found)}, this version of mapet reads {version}")
        return conform(kind, values, "its content")
    except (ValueError, RecursionError) as error:
        raise unreadable(path, error, advice) from error


def sha256_of(path: str | os.PathLike, *, most: int | None = None, advice: str = "") -> tuple[int, str]:
    """Bytes of a file, and their SHA-256 as hexadecimal text; of a file of more than `most` bytes, an empty one."""
    try:
        with open_regular(path) as file:
            if most is not None and (size := os.fstat(file.fileno()).st_size) > most:  # it may be sparse, and endless
                return size, ""
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest
    except OSError as error:
        raise unreadable(path, error, advice) from error


def read_tensors(
    path: str | os.PathLike, shapes: Mapping[str, Shape] | None = None, *, finite: bool = False, advice: str = ""
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Args:
        shapes: names and shapes that must be there, and no others; any where it is None. Compared with the file's
            header before a tensor is read.
        finite: whether all must be of floating point, and finite.
    """
    try:
        with _tensors_in(path) as file:
            names = list(file.keys())
            if len(names) > MOST_TENSORS:  # some versions of safetensors take time by their square
                raise ValueError(f"it holds {len(names)} tensors, at most {MOST_TENSORS} are read")
            found = {name: file.get_slice(name) for name in names}
            if shapes is not None:
                check_shapes({name: tuple(part.get_shape()) for name, part in found.items()}, shapes)
            kinds = {name: part.get_dtype() for name, part in found.items()}
            if finite and (other := [name for name, kind in kinds.items() if not kind.startswith(("F", "BF"))]):
                raise ValueError(f"{other[0]} is {kinds[other[0]]}, must be of floating point")
            tensors = {name: file.get_tensor(name) for name in found}
        if finite and (broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]):
            raise ValueError(f"{broken[0]} has NaN or infinity")
        return tensors
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        raise unreadable(path, error, advice) from error


@contextmanager
def _tensors_in(path: str | os.PathLike) -> Iterator[Any]:
    """A safetensors file, open; the library takes no name that is not UTF-8, but finds the file by its descriptor."""
    from safetensors import SafetensorError, safe_open  # which a machine that only times kernels may lack

    with open_regular(path) as opened:
        name = os.fspath(path)
        readable = os.fsencode(name).decode("utf-8", "replace") == name
        try:
            with safe_open(name if readable else f"/dev/fd/{opened.fileno()}", framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise ValueError(str(error)) from error


def tensors_metadata(path: str | os.PathLike, *, advice: str = "") -> dict[str, str]:
    """The texts in the header of a safetensors file."""
    try:
        with _tensors_in(path) as file:
            return dict(file.metadata() or {})
    except (OSError, ValueError, MemoryError) as error:
        raise unreadable(path, error, advice) from error


def check_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    """ValueError naming tensors that are missing, have no place, or have another shape."""
    missing, foreign = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    both = sorted(wanted.keys() & found.keys())
    other = [f"{name} is {found[name]}, must be {wanted[name]}" for name in both if found[name] != wanted[name]]
    for names, text in ((missing, "it lacks"), (foreign, "it holds, and has no place for,")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{text} {', '.join(sorted(names)[:3])}{more}")
    if other:
        raise ValueError("; ".join(other[:3]))


def read_pickle(path: str | os.PathLike, *, classes: Sequence[type] = (), advice: str = "") -> Any:
    """What torch.save wrote, with nothing in it that could run: see `mapet_kernels.regular.load_plain`."""
    try:
        with open_regular(path) as file:
            return load_plain(file, classes)
    except Exception as error:  # damaged bytes fail in as many ways as there are bytes; no code was run
        raise unreadable(path, error, advice) from error


def check_like(value: Any, example: Any, name: str) -> None:
    """ValueError unless a value is built as the example: names, lengths and types, of tensors shape and dtype.

    Numbers must be finite, in tensors too. Examples may be sharded, or on the meta device.
    """
    if isinstance(example, Tensor):
        _check_tensor(value, example, name)
    elif isinstance(example, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a mapping, is {type(value).__name__}")
        for known, found, text in ((value, example, "lacks"), (example, value, "has no place for")):
            if names := [part for part in found if part not in known]:
                raise ValueError(f"{name} {text} {shown(names[0])}")
        for part in example:
            check_like(value[part], example[part], f"{name}.{part}")
    elif isinstance(example, list | tuple):
        if type(value) is not type(example) or len(value) != len(example):
            given = f"{type(value).__name__}{f' of {len(value)}' if isinstance(value, list | tuple) else ''}"
            raise ValueError(f"{name} must be a {type(example).__name__} of {len(example)}, is {given}")
        for i, (part, wanted) in enumerate(zip(value, example, strict=True)):
            check_like(part, wanted, f"{name}[{i}]")
    elif isinstance(value, Tensor):
        raise ValueError(f"{name} must be no tensor")
    else:
        conform(type(example), value, name)


def _check_tensor(value: Any, example: Tensor, name: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, is {type(value).__name__}")
    found, wanted = ((part.dtype, tuple(part.shape)) for part in (value, example))
    if found != wanted:
        raise ValueError(f"{name} is {found[0]} {found[1]}, must be {wanted[0]} {wanted[1]}")
    if not value.isfinite().all():
        raise ValueError(f"{name} has NaN or infinity")


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers by old versions
            array = np.lib.format.open_memmap(path, mode="r")  # which refuses object arrays
    except Exception as error:  # the header is Python source: a damaged one raises whatever the parser raises
        raise unreadable(path, error, advice) from error
    wanted = (array.dtype if dtype is None else np.dtype(dtype), array.shape if shape is None else shape)
    if (array.dtype, array.shape) != wanted:
        raise UnreadableFile(
            path, f"it holds {array.dtype} {array.shape}, expected {wanted[0]} {wanted[1]}", advice=advice
        )
    return array.view(np.ndarray)


@dataclass(frozen=True)
class FileRecord:
    """What a manifest remembers of a file."""

    bytes: Annotated[int, at_least(0)]
    sha256: str

    @classmethod
    def of(cls, path: Path, expected: FileRecord | None = None) -> FileRecord:
        """Size and hash of a file as it is on disk; one larger than expected is not hashed. UnreadableFile."""
        return cls(*sha256_of(path, most=expected.bytes if expected else None))


def write_whole(path: Path, content: str | bytes | memoryview) -> FileRecord:
    """Write a file safely to disk, whole or not at all; text as UTF-8, other bytes in names escaped. OSError."""
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    with replacing(path) as partial:
        partial.write_bytes(content)
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all, making its folder. DataError where the disk does not take it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(values, indent=2, default=str) + "\n")
    except OSError as error:
        raise DataError(f"could not write {path}: {error.strerror or error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write, whose file then takes the place of `path`, safely on the disk, unless the block fails. OSError.

    A file that a killed process left half-written is written again by the next call for the same path. Through a link
    nothing is written.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_through(path: Path, content: bytes | memoryview) -> FileRecord:
    """Write a file and wait until it is on the disk; the record is of what was meant to be written. OSError."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def move_folder(new: Path, place: Path, aside: Path) -> bool:
    """Put a complete folder in a place; what is there steps `aside` first, and comes back where the move fails.

    Returns:
        Whether something has stepped aside, which is for the caller to remove. OSError.
    """
    sync_folder(new)
    there = place.exists()  # a folder cannot be renamed onto a full one
    if there:
        os.rename(place, aside)
    try:
        os.rename(new, place)
    except OSError:
        if there:
            os.rename(aside, place)
        raise
    sync_folder(place.parent)
    return there


def sync_folder(folder: Path) -> None:
    """Put the names in a folder safely on disk, where the system knows how to."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class NpyWriter:
    """One .npy file of shape (rows, *row_shape) that grows row by row; `close` completes it.

    Rows are written, not mapped: a memory-mapped write to a full disk kills the process with SIGBUS, a plain one raises
    an error that can be handled. As a context manager it closes a file whose content no longer matters.
    """

    def __init__(self, path: Path, dtype: np.dtype | type, row_shape: Shape) -> None:
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

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._file.close()
        except OSError:  # flushing fails once more on a full disk
            self._file.raw.close()


def open_new(path: Path) -> BufferedWriter:
    """A new file, open for binary writing."""
    return open(path, "xb")


def write_rows(path: Path, parts: Iterable[np.ndarray]) -> FileRecord:
    """A .npy file of arrays put one after the other, at least one; a file that is there is replaced."""
    path.unlink(missing_ok=True)
    parts = iter(parts)
    first = next(parts)
    with NpyWriter(path, first.dtype, first.shape[1:]) as file:
        for part in chain((first,), parts):
            file.append(part)
        return file.close()
