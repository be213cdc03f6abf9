"""Writing a token cache: into a hidden folder beside its place, moved there when it is complete."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from torch import Tensor

from mapet.data.manifest import LABELS, MANIFEST, NAMES, TOKENS, CacheDescription, Manifest, Skipped, shard_name
from mapet.data.npyfile import FileRecord, NpyAppender, discard, open_new
from mapet.errors import DataError

SHARD_BYTES = 256 * 2**20
MOST_SHARDS = 256  # a mapped file holds a file descriptor, and 1024 is a usual limit of a process


class CacheWriter:
    """Writes a token cache into a hidden folder beside `path` and moves it there at the end.

    Use it in a with statement; leaving the block without `finish`, by an error or by Ctrl-C, removes what was written
    and leaves a cache that was at `path` as it was. Only a killed process leaves `.NAME.partial-*` behind.

    Args:
        path: the cache's folder.
        description: what the cache holds.
        capacity: most images that will be appended; it sets the size of the shards.
        overwrite: replace a cache at `path`. Anything else at `path` is never replaced.
        shard_bytes: wanted size of a shard; larger where there would be more than 256 shards.
    Raises:
        DataError: something is at `path` that may not be replaced, the disk is full, or the folder is not writable.
    """

    def __init__(
        self,
        path: str | Path,
        description: CacheDescription,
        *,
        capacity: int,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        # The real path: a link to a large disk stays, and the hidden folder lies on that disk.
        self.path, self.description, self.overwrite = Path(os.path.realpath(path)), description, overwrite
        self._work = self.path.with_name(f".{self.path.name}.partial-{secrets.token_hex(4)}")
        self._pixels = (3, description.image_size, description.image_size)
        row_bytes = 3 * description.image_size**2
        self._shard_rows = max(1, shard_bytes // row_bytes, -(-capacity // MOST_SHARDS))
        self._shard: NpyAppender | None = None
        self._shards: list[int] = []
        self._files: dict[str, FileRecord] = {}
        self._tokens: list[np.ndarray] = []

    def __enter__(self) -> CacheWriter:
        with self._disk_errors():
            check_replaceable(self.path, self.overwrite)
            self._work.mkdir(parents=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._shard is not None:
            self._shard.__exit__(kind, error, trace)
        shutil.rmtree(self._work, ignore_errors=True)

    def append(self, images: Tensor, tokens: Tensor) -> None:
        """Add images with their tokens.

        Args:
            images: uint8 (b, 3, S, S).
            tokens: (b, P) of any integer dtype, in [0, vocabulary).
        Raises:
            DataError: another shape or dtype, a token out of range, or the disk is full.
        """
        pixels, ids = images.cpu().numpy(), tokens.cpu().numpy()
        self._check_rows(pixels, ids)
        self._tokens.append(ids.astype(np.uint16))
        with self._disk_errors():
            while len(pixels):
                shard = self._shard or self._new_shard()
                free = self._shard_rows - shard.rows
                shard.append(pixels[:free])
                pixels = pixels[free:]
                if shard.rows == self._shard_rows:
                    self._close_shard()

    def finish(
        self,
        names: Sequence[str],
        labels: np.ndarray | None = None,
        classes: Sequence[str] | None = None,
        skipped: Sequence[Skipped] = (),
    ) -> Manifest:
        """Complete the cache and move it to its place.

        Args:
            names, labels: one per appended image; classes: names of the labels.
            skipped: images of the source that are not in the cache.
        """
        tokens = np.concatenate([np.empty((0, self.description.grid**2), np.uint16), *self._tokens])
        if not len(tokens):
            raise DataError(f"no image to store in the cache {self.path}")
        if len(names) != len(tokens) or (labels is not None and len(labels) != len(tokens)):
            raise ValueError(
                f"{len(tokens)} images, but {len(names)} names and {labels if labels is None else len(labels)} labels"
            )
        with self._disk_errors():
            self._close_shard()
            self._write_array(TOKENS, tokens)
            if labels is not None:
                self._write_array(LABELS, np.asarray(labels, dtype=np.int64))
            self._files[NAMES] = self._write_text(NAMES, json.dumps(list(names), indent=0))
            manifest = Manifest(
                description=self.description,
                images=len(tokens),
                shards=self._shards,
                classes=None if classes is None else list(classes),
                labelled=labels is not None,
                skipped=list(skipped),
                files=self._files,
            )
            self._write_text(MANIFEST, manifest.to_json())
            _replace(self._work, self.path)
        return manifest

    def _check_rows(self, pixels: np.ndarray, ids: np.ndarray) -> None:
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self._pixels:
            raise DataError(f"images are {pixels.dtype} {pixels.shape[1:]}, the cache holds uint8 {self._pixels}")
        patches = (len(pixels), self.description.grid**2)
        if ids.shape != patches or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"tokens are {ids.dtype} {ids.shape}, the cache expects integers {patches}")
        if ids.size and not (ids.min() >= 0 and ids.max() < self.description.vocabulary):
            raise DataError(f"tokens {ids.min()} to {ids.max()}, allowed are 0 to {self.description.vocabulary - 1}")

    def _new_shard(self) -> NpyAppender:
        self._shard = NpyAppender(self._work / shard_name(len(self._shards)), np.uint8, self._pixels)
        return self._shard

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._files[self._shard.path.name] = self._shard.close()
            self._shards.append(self._shard.rows)
            self._shard = None

    def _write_array(self, name: str, array: np.ndarray) -> None:
        with NpyAppender(self._work / name, array.dtype, array.shape[1:]) as file:
            file.append(array)
            self._files[name] = file.close()

    def _write_text(self, name: str, text: str) -> FileRecord:
        file = open_new(self._work / name)
        try:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        finally:
            discard(file)
        return FileRecord.of(self._work / name)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            cause = "the disk is full; free some space and run it again" if full else f"{error.strerror or error}"
            raise DataError(f"cannot write the token cache {self.path}: {cause} (nothing was kept)") from error


def check_replaceable(path: Path, overwrite: bool) -> None:
    """DataError unless a cache may be put at `path`: nothing or an empty folder is there, or a cache to overwrite."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / MANIFEST).is_file():
        raise DataError(f"{path} exists and is no token cache; it is left as it is: give another output folder")
    if not overwrite:
        raise DataError(f"{path} holds a token cache already; give another output folder, or overwrite it")


def _replace(new: Path, path: Path) -> None:
    """Move a folder to `path`. What is there steps aside first, since a folder cannot be renamed onto a full one."""
    if not path.exists():
        os.rename(new, path)
        return
    old = new.with_name(new.name.replace(".partial-", ".replaced-"))
    os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
