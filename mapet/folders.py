"""Folders that commands write: by one process at a time, without loss of what others put there, moved into place whole.

The lock is the kept library filelock's: it ends with its process, however that ends, and a forked worker does not hold
it. On file systems that several machines share it is advisory: it keeps out those whose system forwards locks (NFS 4,
Lustre with flock), and nobody else.

What is to take the place of a folder NAME is made in a hidden one beside it:

    .NAME.partial    the work, and the lock of the process that does it
    .NAME.replaced   the earlier NAME, between the two renames that put the new one in its place
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from mapet.errors import ConfigError, DataError
from mapet.files import UnreadableFile, move_folder, read_json, sync_folder

LOCK = ".mapet.lock"
PARTIAL_FILES = ".*.partial"
LONGEST_NAME = 255
HIDDEN = re.compile(r"\..+\.(partial|replaced)")
SHOWN = 5

CACHE, CHECKPOINT, CHECKPOINTS, EXPORT, TOKENIZER, SAMPLE = (
    "token cache",
    "checkpoint",
    "folder of checkpoints",
    "exported model",
    "tokenizer",
    "feature sample",
)
PRODUCER = {"producer": "mapet"}
"""Our mark in config.json and model.safetensors of an exported model."""

MARKS: tuple[tuple[str, str, Callable[[dict], bool]], ...] = (
    (CACHE, "manifest.json", lambda values: {"format", "description", "shards", "files"} <= values.keys()),
    (CHECKPOINT, "manifest.json", lambda values: {"format", "step", "files"} <= values.keys()),
    (EXPORT, "config.json", lambda values: values.items() >= PRODUCER.items()),
    (TOKENIZER, "tokenizer.json", lambda values: {"format", "fingerprint", "codebook_sha256"} <= values.keys()),
    ("unfinished fit", "sample.json", lambda values: {"images", "patches", "settings"} <= values.keys()),
    (SAMPLE, "plan.json", lambda values: {"source_fingerprint", "group"} <= values.keys()),
)
"""What a folder is, by a JSON file in it."""


class BusyFolder(DataError):
    """Another process is at work in a folder."""


class FolderLock:
    """The lock of a folder, which is made where it is missing; `release` leaves no trace of either.

    BusyFolder, naming what and where (`place`, for a hidden folder), while another process holds it. OSError where it
    cannot be written.
    """

    def __init__(self, folder: Path, what: str, place: Path | None = None) -> None:
        self.folder, self._process = folder, os.getpid()
        self._made = [place for place in (folder, *folder.parents) if not place.exists()]
        if not self._made and HIDDEN.fullmatch(folder.name):
            self._made = [folder]
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / LOCK, timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise BusyFolder(
                f"another process is at work on the {what} in {place or folder}: wait for it, or end it"
            ) from error

    def release(self) -> None:
        """Give it back; folders that were made for it, or a hidden one, go if they are empty."""
        if os.getpid() != self._process:  # a fork of the holder
            return
        # Before the lock is given back: whoever waits for it is told that its file is gone.
        with suppress(OSError):
            (self.folder / LOCK).unlink()
        self._lock.release()
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of a folder for the block. BusyFolder; DataError where the folder cannot be written."""
    try:
        lock = FolderLock(folder, what)
    except OSError as error:
        raise DataError(f"cannot write the {what} in {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def claim(folder: Path, what: str, names: Sequence[str], place: Path | None = None) -> FolderLock:
    """The lock of a folder that is for our work alone: DataError where others than `names` are in it.

    Args:
        names: patterns; those with a suffix are of files, and a folder of such a name is not ours.
    """
    if folder.is_dir():
        allowed = (LOCK, "lock", PARTIAL_FILES, *names)  # earlier versions had a file `lock`
        foreign = [path.name for path in folder.iterdir() if not any(_fits(path, pattern) for pattern in allowed)]
        if foreign:
            raise DataError(f"{folder} exists and holds no work of mapet; move it away ({_listed(folder, foreign)})")
    return FolderLock(folder, what, place)


def clear(folder: Path) -> None:
    """Delete all that is in a folder of ours but the lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def kind_of(folder: Path) -> str | None:
    """What of ours a folder is, where it is read or replaced as a whole; None for others."""
    if HIDDEN.fullmatch(folder.name):
        return "folder of unfinished work"
    for kind, name, fits in MARKS:
        with suppress(UnreadableFile):
            values = read_json(folder / name)
            if isinstance(values, dict) and fits(values):
                return kind
    if folder.name == "checkpoints" and ((folder.parent / "metrics.jsonl").exists() or _any(folder, "step_*")):
        return CHECKPOINTS
    if folder.name == "features" and _any(folder, "features_*.npy"):
        return "folder of features"
    return None


def a(kind: str) -> str:
    """A kind with its article."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def instead(folder: Path) -> str:
    """What else of ours a folder is, for a message that it is not what was asked for; empty for others."""
    kind = kind_of(folder)
    return f" (it is {a(kind)})" if kind else ""


def check_name(path: str | Path, kind: str, *, staged: bool = False, option: str = "--output") -> None:
    """ConfigError unless a folder can have this path; arguments as `check_place`."""
    path, most = Path(path), LONGEST_NAME - len("..replaced") * staged
    if "\0" in str(path) or path.name in ("", "..") or not os.path.basename(os.path.realpath(path)):
        raise ConfigError(f"{option} {str(path)!r} names no folder: give the {kind} a name of its own")
    if (length := max(len(os.fsencode(part)) for part in (path.name, os.path.basename(os.path.realpath(path))))) > most:
        raise ConfigError(f"{option}: the name of the {kind} has {length} bytes, at most {most} will do: {path}")
    try:
        path.stat()
    except OSError as error:  # others are met, and told, by those who write
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise ConfigError(f"{option} {path}: {error.strerror}") from error


def check_place(path: str | Path, kind: str, *, staged: bool = False, option: str = "--output") -> None:
    """ConfigError unless a folder of this kind may be at `path`: it has a name, and is not inside another output.

    Args:
        staged: whether the hidden folders beside it need room for their names.
    """
    check_name(path, kind, staged=staged, option=option)
    real = Path(os.path.realpath(path))
    try:
        for place in (real, *real.parents):
            found = kind_of(place)
            if found and not (found == kind and place == real):
                where = "there" if place == real else "around it"
                raise ConfigError(
                    f"{option} {path}: {place} is {a(found)}, and nothing else may be {where}; name another folder"
                )
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror or error}") from error


def check_apart(places: Mapping[str, Path | None]) -> None:
    """ConfigError where, of folders by the option that names them, one equals another or lies inside it."""
    real = {option: Path(os.path.realpath(path)) for option, path in places.items() if path is not None}
    for option, path in real.items():
        for other, around in real.items():
            if option != other and path.is_relative_to(around):
                raise ConfigError(f"{option} {path} is {other} {around} or inside it; name another folder")


def check_writable(folder: Path) -> None:
    """DataError unless a folder can be made or written; nothing is."""
    try:
        place = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
        if not place.is_dir():
            raise DataError(f"cannot write {folder}: {place} is no folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise DataError(f"cannot write {folder}: no permission to write in {place}, or the disk is read-only")
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}") from error


class Staging:
    """A folder that is made in a hidden one, and moved to its place as a whole; it replaces only what is of its kind.

    Args:
        path: of the folder; where that is a link, it stays, and all this happens beside the folder that it names.
        kind: of the folder, in words.
        files: names of the files that such a folder has, the one that tells its kind last; DataError where it is none.
    """

    def __init__(self, path: str | Path, kind: str, files: Callable[[Path], Sequence[str]]) -> None:
        check_place(path, kind, staged=True)
        self.path, self.kind, self._files = Path(os.path.realpath(path)), kind, files
        self.folder = self.path.with_name(f".{self.path.name}.partial")
        self.replaced = self.path.with_name(f".{self.path.name}.replaced")

    def earlier(self, folder: Path | None = None) -> Sequence[str] | None:
        """Files of the one that is there; None where nothing or an empty folder is. DataError, by name, for others."""
        folder = folder or self.path
        if not os.path.lexists(folder):
            return None
        if not folder.is_dir():
            raise DataError(f"{folder} is no {self.kind}; it is left as it is: it is no folder")
        names = [name for name in os.listdir(folder) if name != LOCK]
        if not names:
            return None
        try:
            files = self._files(folder)
        except DataError as error:
            raise DataError(
                f"{folder} is no {self.kind}; it is left as it is, with {_listed(folder, names)}: give another output "
                f"folder ({error})"
            ) from error
        foreign = [name for name in names if name not in files or not (folder / name).is_file()]
        if foreign:
            raise DataError(
                f"{folder} holds other things than a {self.kind}: {_listed(folder, foreign)}; it is left as it is: "
                "move them away, or give another output folder"
            )
        return files

    def restore(self) -> None:
        """Put right what a process left that was killed while it moved; whoever calls this holds the lock."""
        if not os.path.lexists(self.replaced):
            return
        files = self.earlier(self.replaced)
        if files is not None and self.earlier() is None:
            os.rename(self.replaced, self.path)
        else:
            drop(self.replaced, files or ())

    def move(self, new: Path) -> None:
        """Put a complete folder in the place. DataError where in the meantime something else came to be there."""
        self.restore()
        files = self.earlier()
        if move_folder(new, self.path, self.replaced):
            drop(self.replaced, files or ())

    @contextmanager
    def making(self) -> Iterator[Path]:
        """An empty folder to fill and `move`, under the lock. What a killed process left goes; in the end all does."""
        lock = claim(self.folder, self.kind, ("new",), self.path)
        try:
            self.restore()
            clear(self.folder)
            new = self.folder / "new"
            new.mkdir()
            yield new
        finally:
            with suppress(OSError):
                clear(self.folder)
            lock.release()


def set_aside(folder: Path, names: Sequence[str]) -> Path | None:
    """Move those of `names` (patterns) that are in a folder into `before_1` (`before_2`, ...) in it; None for nothing.

    The last pattern is moved last. A call that was killed is completed by the next one. DataError where the disk does
    not take it.
    """
    try:
        found = [path for pattern in names for path in sorted(folder.glob(pattern))]
        number = next(number for number in count(1) if not os.path.lexists(folder / f"before_{number}"))
        aside, partial = folder / f"before_{number}", folder / ".before.partial"
        if partial.is_symlink():
            partial.unlink()
        if partial.is_dir() and any((partial / path.name).exists() for path in found):
            partial.rename(aside)  # of a killed call, and a run has been there since
            return set_aside(folder, names)
        if not found and not partial.is_dir():
            return None
        partial.mkdir(exist_ok=True)
        for path in found:
            path.rename(partial / path.name)
        partial.rename(aside)
        sync_folder(folder)
    except OSError as error:
        raise DataError(f"cannot set the earlier run in {folder} aside: {error.strerror or error}") from error
    return aside


def drop(folder: Path, names: Sequence[str]) -> None:
    """Delete the files of these names (patterns) in a folder, and it unless something else has come to be in it."""
    with suppress(OSError):
        for path in [path for name in (*names, LOCK, PARTIAL_FILES) for path in folder.glob(name)]:
            path.unlink()
        folder.rmdir()


def _fits(path: Path, pattern: str) -> bool:
    return fnmatch(path.name, pattern) and not (Path(pattern).suffix and path.is_dir())


def _any(folder: Path, pattern: str) -> bool:
    return next(folder.glob(pattern), None) is not None


def _listed(folder: Path, names: Sequence[str]) -> str:
    shown = [f"{name}/" if (folder / name).is_dir() else name for name in sorted(names)[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
