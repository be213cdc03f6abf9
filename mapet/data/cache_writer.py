"""Writing a token cache shard by shard, into a hidden folder beside its place, moved there when it is complete.

A shard holds the images of one range of positions in the source. The hidden folder:

    .NAME.partial/plan.json, part_*.json         the records of the job (mapet/data/jobs.py), and the lock
    .NAME.partial/tokens_00007.npy               tokens of a shard, uint16 (rows, P)
    .NAME.partial/cache/images_00007.npy         its images: the cache in the making
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mapet.data.jobs import Part, Rows, ShardedJob, in_batches
from mapet.data.manifest import LABELS, MANIFEST, NAMES, TOKENS, CacheDescription, Manifest, read_manifest, shard_name
from mapet.distributed import World
from mapet.errors import DataError
from mapet.files import map_array, write_rows, write_whole
from mapet.folders import CACHE, Staging, claim, clear

SHARD_IMAGES = 1024
SHARD_BYTES = 256 * 2**20
MOST_SHARDS = 256  # a mapped file holds a file descriptor, and 1024 is a usual limit of a process


def shard_size(capacity: int, image_size: int, wanted: int = 0) -> int:
    """Images of a shard: `wanted`, or 1024 or what 256 MB hold; more where there would be more than 256 shards."""
    most = wanted or min(SHARD_IMAGES, SHARD_BYTES // (3 * image_size**2))
    return max(1, most, -(-capacity // MOST_SHARDS))


class CacheWriter(ShardedJob):
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
        world, provenance: as in ShardedJob.
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
        world: World | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        self.staging, self.description, self.overwrite = cache_staging(path), description, overwrite
        self.path, self.capacity = self.staging.path, capacity
        shard_images = shard_size(capacity, description.image_size, shard_images)
        self.pixels, self.patches = (3, description.image_size, description.image_size), description.grid**2
        super().__init__(
            self.staging.folder,
            {**asdict(description), "images": capacity, "shard_images": shard_images},
            in_batches(range(capacity), shard_images),
            {"cache/images_{}.npy": (np.uint8, self.pixels), "tokens_{}.npy": (np.uint16, (self.patches,))},
            CACHE,
            place=self.path,
            world=world,
            provenance=provenance,
        )

    def __enter__(self) -> CacheWriter:
        self.begin()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def begin(self, *, restart: bool = False) -> list[int]:
        try:
            with self.disk_errors():
                check_replaceable(self.staging, self.overwrite)
                found = super().begin(restart=restart or self.overwrite)
                self.staging.restore()
                check_replaceable(self.staging, self.overwrite)
                (self.folder / "cache").mkdir(exist_ok=True)
        except BaseException:
            self.close()
            raise
        return found

    def close(self) -> None:
        """Give the lock back. A hidden folder without a finished image is removed, unless others are at work in it."""
        if self.locked:
            self.end(remove=self.world.size == 1 and not any(part.rows for part in self.parts().values()))

    def checked(self, images: Tensor, tokens: Tensor) -> Rows:
        """The rows of a shard's files, of images with their tokens.

        Args:
            images: uint8 (b, 3, S, S).
            tokens: (b, P) of any integer dtype, in [0, vocabulary).
        Raises:
            DataError: another shape or dtype, or a token out of range.
        """
        pixels, ids, vocabulary = images.cpu().numpy(), tokens.cpu().numpy(), self.description.vocabulary
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self.pixels:
            raise DataError(f"images are {pixels.dtype} {pixels.shape[1:]}, the cache holds uint8 {self.pixels}")
        patches = (len(pixels), self.patches)
        if ids.shape != patches or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"tokens are {ids.dtype} {ids.shape}, the cache expects integers {patches}")
        if ids.size and not (ids.min() >= 0 and ids.max() < vocabulary):
            raise DataError(f"tokens {ids.min()} to {ids.max()}, allowed are 0 to {vocabulary - 1}")
        return pixels, ids.astype(np.uint16)

    def fits(self, number: int, part: Part) -> bool:
        return super().fits(number, part) and part.rows + len(part.skipped) == len(self.positions(number))

    def kept(self) -> list[int]:
        """Positions in the source of the images of all finished shards."""
        lost = {position for part in self.parts().values() for position, _, _ in part.skipped}
        return [position for number in self.parts() for position in self.positions(number) if position not in lost]

    def finish(
        self, names: Sequence[str], labels: np.ndarray | None = None, classes: Sequence[str] | None = None
    ) -> Manifest:
        """Complete the cache and move it to its place, when all shards are finished.

        Args:
            names, labels: one per image that was kept, in order; classes: names of the labels.
        """
        parts, place = self.parts(), self.folder / "cache"
        if list(parts) != list(range(self.shards)):
            raise DataError(f"{self.folder} has {len(parts)} of {self.shards} finished shards: others were taken away")
        rows = [part.rows for part in parts.values()]
        if not sum(rows):
            raise DataError(f"no image to store in the cache {self.path}")
        if len(names) != sum(rows) or (labels is not None and len(labels) != sum(rows)):
            raise ValueError(
                f"{sum(rows)} images, but {len(names)} names and {labels if labels is None else len(labels)} labels"
            )
        with self.disk_errors():
            files = {shard_name(number): part.files[self.files(number)[0]] for number, part in parts.items()}
            tokens = (
                map_array(self.folder / self.files(number)[1], np.uint16, (count, self.patches))
                for number, count in enumerate(rows)
            )
            files[TOKENS] = write_rows(place / TOKENS, tokens)
            if labels is not None:
                files[LABELS] = write_rows(place / LABELS, [np.asarray(labels, dtype=np.int64)])
            files[NAMES] = write_whole(place / NAMES, json.dumps(list(names), indent=0))
            made = [part.provenance for part in parts.values()]
            manifest = Manifest(
                description=self.description,
                images=sum(rows),
                shards=rows,
                classes=None if classes is None else list(classes),
                labelled=labels is not None,
                skipped=self.skipped(),
                files=files,
                provenance=[value for i, value in enumerate(made) if value not in made[:i]],
            )
            write_whole(place / MANIFEST, manifest.to_json())
            self.staging.move(place)
        self.end(remove=True)
        return manifest

    def sweep(self) -> None:
        """Put right what a run left that was killed between moving the cache to its place and the end.

        Nothing is done where another process is at work, or the disk may only be read.
        """
        moved = self.folder.is_dir() and not (self.folder / "cache").exists()
        if not moved and not os.path.lexists(self.staging.replaced):
            return
        with suppress(DataError, OSError):
            lock = claim(self.folder, CACHE, self.names, self.path)
            try:
                self.staging.restore()
                if self.read_plan() == self.plan and not (self.folder / "cache").exists():
                    clear(self.folder)
            finally:
                lock.release()


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
