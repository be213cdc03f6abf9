"""Writing a token cache shard by shard, into a hidden folder beside its place, moved there when it is complete.

A shard holds the images of one range of positions in the source. Shards can be written in any order, by any process;
the journal (mapet/data/jobs.py) knows the finished ones, so that a killed run goes on from there. The hidden folder:

    .NAME.partial/plan.json, part_*.json         the journal, and the lock
    .NAME.partial/tokens_00007.npy               tokens of a shard, uint16 (rows, P)
    .NAME.partial/cache/images_00007.npy         its images: the cache in the making
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from mapet.data.jobs import Journal, Part
from mapet.data.manifest import (
    LABELS,
    MANIFEST,
    NAMES,
    TOKENS,
    CacheDescription,
    Manifest,
    Skipped,
    read_manifest,
    shard_name,
)
from mapet.errors import DataError
from mapet.files import FileRecord, NpyWriter, map_array, write_rows, write_whole
from mapet.folders import CACHE, Staging, claim, clear

SHARD_IMAGES = 1024
SHARD_BYTES = 256 * 2**20
MOST_SHARDS = 256  # a mapped file holds a file descriptor, and 1024 is a usual limit of a process


def shard_size(capacity: int, image_size: int, wanted: int = 0) -> int:
    """Images of a shard: `wanted`, or 1024 or what 256 MB hold; more where there would be more than 256 shards."""
    most = wanted or min(SHARD_IMAGES, SHARD_BYTES // (3 * image_size**2))
    return max(1, most, -(-capacity // MOST_SHARDS))


@dataclass(frozen=True)
class ShardFacts:
    """What the record of a shard says besides its files; `skipped` by position in the source, with name and reason."""

    skipped: list[tuple[int, str, str]]
    provenance: dict[str, str]


@dataclass(frozen=True)
class FinishedShard:
    """What the journal remembers of a shard.

    Attributes:
        kept: positions in the source of its images.
        skipped: images of its range that could not be read.
        provenance: what made its tokens, as text by name.
    """

    kept: list[int]
    skipped: list[Skipped]
    provenance: dict[str, str]


class CacheWriter:
    """Writes a token cache; `begin` (main process), shards, `finish` (main process), and `close` in any case.

    As a context manager it begins and closes. Closing before `finish` leaves a cache that was at `path` as it was, and
    keeps the finished shards, if any, for the next run of the same job.

    Args:
        path: the cache's folder.
        description: what the cache holds.
        capacity: positions in the source; every shard but the last has `shard_images` of them.
        overwrite: replace a cache at `path`, and drop unfinished work of another kind. Other things are never replaced,
            nor a cache with other things in its folder.
        shard_images: wanted size of a shard, as in `shard_size`.
        processes: that write the cache together.
        provenance: what makes the tokens of the shards this process writes.
    Raises:
        ConfigError: no folder can have this path, or it lies inside another output.
        DataError: something is at `path` that may not be replaced, unfinished work of another kind is in its hidden
            folder, another process is at work there, the disk is full, or the folder is not writable.
    """

    def __init__(
        self,
        path: str | Path,
        description: CacheDescription,
        *,
        capacity: int,
        overwrite: bool = False,
        shard_images: int = 0,
        processes: int = 1,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        self.staging, self.description, self.overwrite = cache_staging(path), description, overwrite
        self.path = self.staging.path
        self.capacity, self.processes, self.provenance = capacity, processes, dict(provenance or {})
        self.shard_images = shard_size(capacity, description.image_size, shard_images)
        self.shards = -(-capacity // self.shard_images)
        plan = {**asdict(description), "images": capacity, "shard_images": self.shard_images}
        self.journal = Journal(
            self.staging.folder,
            plan,
            CACHE,
            ("cache", "tokens_*.npy"),
            self.path,
            parts=self.shards,
            files=lambda number: (_images_file(number), _tokens_file(number)),
            facts=ShardFacts,
        )
        self.dropped: list[str] = []
        """In what unfinished work differed that `begin` has deleted."""

    def __enter__(self) -> CacheWriter:
        self.begin()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def work(self) -> Path:
        """The hidden folder."""
        return self.journal.folder

    def begin(self) -> list[int]:
        """Make or find the hidden folder; in the main process, before any other touches it.

        Returns:
            Numbers of the shards that an earlier run has finished; their files are still to be checked (`damage`).
        """
        try:
            with self.disk_errors():
                check_replaceable(self.staging, self.overwrite)
                self.dropped = self.journal.begin(restart=self.overwrite)
                self.staging.restore()
                check_replaceable(self.staging, self.overwrite)
                (self.work / "cache").mkdir(exist_ok=True)
        except BaseException:
            self.close()
            raise
        return list(self.journal.parts())

    def close(self) -> None:
        """Give the lock back. A hidden folder without a finished image is removed, unless others are at work in it."""
        if self.journal.locked:
            self.journal.end(remove=self.processes == 1 and not any(shard.kept for shard in self.finished()))

    def positions(self, shard: int) -> range:
        """Positions in the source that a shard is for."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.capacity))

    def damage(self, shard: int) -> str | None:
        """What is wrong with the files of a finished shard; None where nothing is."""
        part = self.journal.parts().get(shard)
        return "it has no record" if part is None else self.journal.damage(part)

    def shard(self, number: int) -> ShardWriter:
        """A shard to be written, or to be written again."""
        return ShardWriter(self, number)

    def finished(self) -> list[FinishedShard]:
        """The finished shards in order, of all processes."""
        return [self._from_part(number, part) for number, part in self.journal.parts().items()]

    def finish(
        self, names: Sequence[str], labels: np.ndarray | None = None, classes: Sequence[str] | None = None
    ) -> Manifest:
        """Complete the cache and move it to its place, when all shards are finished.

        Args:
            names, labels: one per image that was kept, in order; classes: names of the labels.
        """
        parts, shards = self.journal.parts(), self.finished()
        if list(parts) != list(range(self.shards)):
            raise DataError(f"{self.work} has {len(parts)} of {self.shards} finished shards: others were taken away")
        rows = [len(shard.kept) for shard in shards]
        if not sum(rows):
            raise DataError(f"no image to store in the cache {self.path}")
        if len(names) != sum(rows) or (labels is not None and len(labels) != sum(rows)):
            raise ValueError(
                f"{sum(rows)} images, but {len(names)} names and {labels if labels is None else len(labels)} labels"
            )
        with self.disk_errors():
            files = {shard_name(number): part.files[_images_file(number)] for number, part in parts.items()}
            files[TOKENS] = self._write_tokens(rows)
            if labels is not None:
                files[LABELS] = write_rows(self.work / "cache" / LABELS, [np.asarray(labels, dtype=np.int64)])
            files[NAMES] = self._write_text(NAMES, json.dumps(list(names), indent=0))
            manifest = Manifest(
                description=self.description,
                images=sum(rows),
                shards=rows,
                classes=None if classes is None else list(classes),
                labelled=labels is not None,
                skipped=[item for shard in shards for item in shard.skipped],
                files=files,
                provenance=_distinct([shard.provenance for shard in shards]),
            )
            self._write_text(MANIFEST, manifest.to_json())
            self.staging.move(self.work / "cache")
        self.journal.end(remove=True)
        return manifest

    def sweep(self) -> None:
        """Put right what a run left that was killed between moving the cache to its place and the end.

        Nothing is done where another process is at work, or the disk may only be read.
        """
        moved = self.work.is_dir() and not (self.work / "cache").exists()
        if not moved and not os.path.lexists(self.staging.replaced):
            return
        with suppress(DataError, OSError):
            lock = claim(self.work, CACHE, self.journal.names, self.path)
            try:
                self.staging.restore()
                if self.journal.read_plan() == self.journal.plan and not (self.work / "cache").exists():
                    clear(self.work)
            finally:
                lock.release()

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Errors of the operating system as DataError that says what is kept."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            cause = "the disk is full; free some space and run it again" if full else f"{error.strerror or error}"
            count = len(self.journal.parts())
            kept = f"{count} of {self.shards} shards are kept, to go on from" if count else "nothing was kept"
            raise DataError(f"cannot write the token cache {self.path}: {cause} ({kept})") from error

    def _from_part(self, number: int, part: Part) -> FinishedShard:
        skipped = [Skipped(name, reason) for _, name, reason in part.facts.skipped]
        missing = {position for position, _, _ in part.facts.skipped}
        kept = [position for position in self.positions(number) if position not in missing]
        return FinishedShard(kept, skipped, part.facts.provenance)

    def _write_tokens(self, rows: Sequence[int]) -> FileRecord:
        patches = self.description.grid**2
        parts = (
            map_array(self.work / _tokens_file(number), np.uint16, (count, patches))
            for number, count in enumerate(rows)
        )
        return write_rows(self.work / "cache" / TOKENS, parts)

    def _write_text(self, name: str, text: str) -> FileRecord:
        return write_whole(self.work / "cache" / name, text)


class ShardWriter:
    """One shard: appended to, then finished. Leaving the with block before that removes what was written."""

    def __init__(self, writer: CacheWriter, number: int) -> None:
        self.writer, self.number = writer, number
        size = writer.description.image_size
        self._pixels = (3, size, size)
        self._path = writer.work / _images_file(number)
        self._tokens = [np.empty((0, writer.description.grid**2), np.uint16)]
        self._file: NpyWriter | None = None

    def __enter__(self) -> ShardWriter:
        with self.writer.disk_errors():
            self._path.unlink(missing_ok=True)  # of a run that was killed
            self._file = NpyWriter(self._path, np.uint8, self._pixels)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.__exit__(kind, error, trace)
            self._path.unlink(missing_ok=True)

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
        with self.writer.disk_errors():
            self._file.append(pixels)

    def finish(self, skipped: Mapping[int, Skipped] | None = None) -> None:
        """Put the shard safely on disk and record it.

        Args:
            skipped: by position in the source, the images of the shard's range that were not appended.
        """
        skipped, wanted = skipped or {}, len(self.writer.positions(self.number))
        if self._file.rows + len(skipped) != wanted:
            raise ValueError(
                f"shard {self.number} is for {wanted} images, got {self._file.rows}, and {len(skipped)} skipped"
            )
        with self.writer.disk_errors():
            tokens = _tokens_file(self.number)
            files = {_images_file(self.number): self._file.close(), tokens: self._write(tokens)}
            facts = ShardFacts(
                skipped=[(position, item.name, item.reason) for position, item in sorted(skipped.items())],
                provenance=self.writer.provenance,
            )
            self.writer.journal.finish(self.number, files, facts)
        self._file = None

    def _write(self, name: str) -> FileRecord:
        return write_rows(self.writer.work / name, self._tokens)

    def _check_rows(self, pixels: np.ndarray, ids: np.ndarray) -> None:
        made = self.writer.description
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self._pixels:
            raise DataError(f"images are {pixels.dtype} {pixels.shape[1:]}, the cache holds uint8 {self._pixels}")
        patches = (len(pixels), made.grid**2)
        if ids.shape != patches or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"tokens are {ids.dtype} {ids.shape}, the cache expects integers {patches}")
        if ids.size and not (ids.min() >= 0 and ids.max() < made.vocabulary):
            raise DataError(f"tokens {ids.min()} to {ids.max()}, allowed are 0 to {made.vocabulary - 1}")


def write_cache(
    path: str | Path,
    description: CacheDescription,
    images: Tensor,
    tokens: Tensor,
    names: Sequence[str],
    labels: np.ndarray | None = None,
    classes: Sequence[str] | None = None,
    *,
    overwrite: bool = False,
    shard_images: int = 0,
) -> Manifest:
    """A cache of images and tokens that are in memory; arguments and errors as in CacheWriter and its methods."""
    with CacheWriter(path, description, capacity=len(images), overwrite=overwrite, shard_images=shard_images) as writer:
        for number in range(writer.shards):
            rows = torch.as_tensor(writer.positions(number))
            with writer.shard(number) as shard:
                shard.append(images[rows], tokens[rows])
                shard.finish()
        return writer.finish(names, labels, classes)


def cache_staging(path: str | Path) -> Staging:
    """Where a cache for `path` is made, and what of it may be replaced. ConfigError for a path that cannot be."""
    return Staging(path, CACHE, lambda folder: [*read_manifest(folder).file_names(), MANIFEST])


def check_replaceable(staging: Staging, overwrite: bool) -> None:
    """DataError unless a cache may be put there: nothing or an empty folder is there, or a cache alone to overwrite."""
    if staging.earlier() is not None and not overwrite:
        raise DataError(f"{staging.path} holds a token cache already; give another output folder, or overwrite it")


def _images_file(number: int) -> str:
    return f"cache/{shard_name(number)}"


def _tokens_file(number: int) -> str:
    return f"tokens_{number:05d}.npy"


def _distinct(values: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [value for i, value in enumerate(values) if value not in values[:i]]
