"""Folders that one process at a time works in.

The lock is the kept library filelock's: it ends with its process, however that ends, and a forked worker does not hold
it. On file systems that several machines share it is advisory: it keeps out those whose system forwards locks (NFS 4,
Lustre with flock), and nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mapet.errors import DataError

LOCK = ".mapet.lock"


class BusyFolder(DataError):
    """Another process is at work in a folder."""


def take_lock(folder: Path, what: str) -> FileLock:
    """The lock of a folder, which is made where it is missing; give it back with `release`.

    BusyFolder, naming what and where, while another process holds it. OSError where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BusyFolder(f"another process is at work on the {what} in {folder}: wait for it, or end it") from error
    return lock


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of a folder for the block; errors as `take_lock`."""
    lock = take_lock(folder, what)
    try:
        yield
    finally:
        lock.release()
