"""A long job over the images of a source, done shard by shard: killed at any moment it goes on from what is finished.

    plan.json        what the job is; the same command finds it again
    part_00007.json  written when the files of shard 7 are safely on disk, last and whole or not at all
    .mapet.lock      held by the main process while it runs; a killed process holds nothing (mapet/folders.py)

A process that dies leaves its finished shards, and files without a record, which are made again. Several processes
share the shards; what is in one depends on neither them nor an interruption.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mapet.checked import at_least
from mapet.data.decode import centre_square
from mapet.data.feed import PATIENCE, Feed
from mapet.data.images import ImageSource
from mapet.data.manifest import Skipped
from mapet.data.stages import StageClock, TimeUse, stage
from mapet.distributed import World
from mapet.errors import ConfigError, DataError
from mapet.files import FileRecord, NpyWriter, UnreadableFile, read_record, sync_folder, write_whole
from mapet.folders import FolderLock, claim, clear
from mapet.progress import progress
from mapet.words import say

PLAN = "plan.json"
SHOWN = 5
Rows = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Reading:
    """How the images of a source are read. ConfigError where a number is out of range.

    Attributes:
        batch_size: images that are decoded, and go through a network, together.
        workers: processes that decode, for each process of the world.
        patience: seconds that a worker may take for one image.
        max_skipped: largest part of the images, over all processes, that may be unreadable; those are listed.
    """

    batch_size: int = 64
    workers: int = 2
    patience: float = PATIENCE
    max_skipped: float = 0.01

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.workers < 0:
            raise ConfigError(f"workers must not be negative, got {self.workers}")
        if not 0 <= self.max_skipped <= 1:
            raise ConfigError(f"max_skipped is a fraction in [0, 1], got {self.max_skipped}")

    def check_skipped(self, skipped: Sequence[Skipped], total: int) -> None:
        """DataError naming the first images where more are skipped than may be of `total`."""
        if len(skipped) > (allowed := int(self.max_skipped * total)):
            reasons = "; ".join(item.reason for item in skipped[:SHOWN])
            raise DataError(
                f"{len(skipped)} unreadable images, but max_skipped {self.max_skipped:g} of {total} allows "
                f"{allowed}: {reasons}; remove or repair them, or raise max_skipped"
            )


@dataclass(frozen=True)
class Prepared:
    """One batch of decoded images.

    Attributes:
        ids: positions in the source of the images that could be read, (b).
        crops: uint8 (b, 3, S, S) centre squares; None where none were asked for, or no image could be read.
        inputs: uint8 (b, 3, s, s) for the tokenizer; None likewise.
        skipped: the images that could not be read, by position.
    """

    ids: list[int]
    crops: Tensor | None
    inputs: Tensor | None
    skipped: dict[int, Skipped]

    def pin_memory(self) -> Prepared:
        """With the inputs in page-locked memory, from which a GPU copies without waiting; the DataLoader calls this."""
        return self if self.inputs is None else replace(self, inputs=self.inputs.pin_memory())


@dataclass(frozen=True)
class Preparation:
    """Makes batches of positions of a source into Prepared, each image decoded once.

    Attributes:
        image_size: side of the centre squares to crop; 0 for none.
        prepare: `Tokenizer.prepare`, which makes squares of `input_size`; None for no tokenizer inputs.
    """

    source: ImageSource
    image_size: int = 0
    prepare: Callable[[Image.Image], Tensor] | None = None
    input_size: int = 0

    def __call__(self, batch: Sequence[int], beat: Callable[[], None]) -> Prepared:
        ids, crops, inputs, skipped = [], [], [], {}
        for index in batch:
            beat()
            try:
                image = self.source.load(index)
            except DataError as error:
                skipped[index] = Skipped(self.source.names[index], str(error))
                continue
            ids.append(index)
            if self.image_size:
                crops.append(torch.from_numpy(centre_square(image, self.image_size)))
            if self.prepare is not None:
                inputs.append(self.prepare(image))
        return Prepared(ids, torch.stack(crops) if crops else None, torch.stack(inputs) if inputs else None, skipped)

    def feed(self, batches: Sequence[Sequence[int]], reading: Reading, device: torch.device) -> Feed[Prepared]:
        """The batches in order. A context manager, which ends the workers; see Feed."""
        pixels = 3 * (self.image_size**2 + self.input_size**2)
        return Feed(
            self,
            batches,
            workers=reading.workers,
            batch_bytes=max(map(len, batches), default=0) * pixels,
            patience=reading.patience,
            pin_memory=device.type == "cuda",
            # A forked worker shares the tokenizer's weights with its parent; a spawned one would be sent a copy.
            fork=sys.platform == "linux",
            prefix="--",
        )


def in_batches(order: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Positions cut into batches, the last one maybe shorter."""
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class Part:
    """The record of a finished shard.

    Attributes:
        files: by path relative to the job's folder.
        rows: in each of the files.
        skipped: (position, name, reason) of the images that could not be read.
        provenance: what made it, as text by name.
    """

    files: dict[str, FileRecord]
    rows: Annotated[int, at_least(0)]
    skipped: list[tuple[int, str, str]]
    provenance: dict[str, str] = field(default_factory=dict)


class ShardedJob:
    """A job in `folder`; any process of it may read the records and write shards.

    Args:
        folder: holds the records and, below it, the files of the shards.
        plan: all that decides what the shards hold, as JSON values.
        shards: positions in the source that each is for.
        arrays: dtype and shape of a row of the .npy files of every shard, by path; {} in it is the shard's number.
        what, place: what the job makes, in words, and where; by default in the folder.
        names: patterns of what else the job puts into the folder.
        world: the processes that share the work; this one alone where it is None.
        provenance: kept in the records of the shards that this process writes.
    """

    def __init__(
        self,
        folder: Path,
        plan: Mapping[str, Any],
        shards: Sequence[Sequence[int]],
        arrays: Mapping[str, tuple[type, tuple[int, ...]]],
        what: str,
        *,
        place: Path | None = None,
        names: Sequence[str] = (),
        world: World | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.plan, self.arrays = folder, json.loads(json.dumps(plan)), arrays
        self.shards, self._positions = len(shards), shards
        self.what, self.place, self.provenance = what, place or folder, dict(provenance or {})
        self.names = (PLAN, "part_*.json", *(name.format("*").split("/")[0] for name in arrays), *names)
        self.world = world or World(torch.device("cpu"))
        self._lock: FolderLock | None = None

    def begin(self, *, restart: bool = False) -> list[int]:
        """Take the lock, and write the plan where there is none; for the main process, before any other writes.

        Args:
            restart: delete what is left of another job, and say so, instead of refusing it.
        Returns:
            Numbers of the shards that an earlier run has finished; their files are still to be checked.
        Raises:
            DataError: another process holds the lock, the folder is that of another job (the text names what differs),
                or it holds other things.
        """
        self._lock = claim(self.folder, self.what, self.names, self.place)
        try:
            found = self.read_plan()
            differences = self.differences(found or {})
            if found is not None and differences:
                if not restart:
                    raise DataError(
                        f"{self.folder} holds work of another kind ({'; '.join(differences)}); finish it with the "
                        "command that began it, or delete that folder"
                    )
                say(f"dropped unfinished work in {self.folder}: {'; '.join(differences)}")
            if differences:
                clear(self.folder)
                write_whole(self.folder / PLAN, json.dumps(self.plan, indent=1))
        except BaseException:
            self.end()
            raise
        parts = list(self.parts())
        if parts:
            say(f"going on from {len(parts)} of {self.shards} shards in {self.folder}")
        return parts

    def end(self, *, remove: bool = False) -> None:
        """Give the lock back, if this process holds it; `remove` all that is in the folder first."""
        if self._lock is not None:
            if remove:
                with suppress(OSError):
                    clear(self.folder)
            self._lock.release()
            self._lock = None

    @property
    def locked(self) -> bool:
        """Whether this process holds the lock."""
        return self._lock is not None

    def read_plan(self) -> dict[str, Any] | None:
        """The plan in the folder; None where there is none that can be read."""
        try:
            return read_record(self.folder / PLAN, dict[str, Any])
        except UnreadableFile:
            return None

    def differences(self, found: dict[str, Any]) -> list[str]:
        """In what a plan differs from this one, in words."""
        names = [name for name in {**self.plan, **found} if self.plan.get(name) != found.get(name)]
        return [f"{name} is {found.get(name)}, wanted {self.plan.get(name)}" for name in names]

    def positions(self, number: int) -> Sequence[int]:
        """Positions in the source that a shard is for."""
        return self._positions[number]

    def parts(self) -> dict[int, Part]:
        """The records of the finished shards by number, ascending; files are not looked at."""
        try:
            names = os.listdir(self.folder)
        except OSError:  # not there yet, or not to be read, which `begin` reports
            return {}
        numbers = sorted(int(found[1]) for name in names if (found := re.fullmatch(r"part_(\d+)\.json", name)))
        parts = {number: self._read_part(number) for number in numbers if number < self.shards}
        return {number: part for number, part in parts.items() if part is not None}

    def files(self, number: int) -> list[str]:
        """Paths of a shard's files, relative to the folder."""
        return [name.format(f"{number:05d}") for name in self.arrays]

    def skipped(self) -> list[Skipped]:
        """The unreadable images of all finished shards."""
        return [Skipped(name, reason) for part in self.parts().values() for _, name, reason in part.skipped]

    def damage(self, number: int) -> str | None:
        """What is wrong with the files of a finished shard, size and SHA-256; None where nothing is."""
        part = self.parts().get(number)
        for name, record in part.files.items() if part else ():
            try:
                found = FileRecord.of(self.folder / name, record)
            except UnreadableFile as error:
                return f"{name} cannot be read: {error.reason}"
            if found != record:
                return f"{name} is not as it was written"
        return None if part else "it has no record"

    def missing(self, found: Sequence[int]) -> list[int]:
        """Shards to be written; the processes share the checking of those found, and warn of damaged ones."""
        for rank, plan in enumerate(self.world.gather(self.plan)):
            if differences := self.differences(plan):
                raise DataError(f"process {rank} has another job than process {self.world.rank}: {differences[0]}")
        damaged = []
        for number in found[self.world.rank :: self.world.size]:
            if damage := self.damage(number):
                warnings.warn(f"shard {number} of {self.folder} is made again: {damage}", stacklevel=2)
                self._part(number).unlink(missing_ok=True)
                damaged.append(number)
        intact = set(found) - {number for numbers in self.world.gather(damaged) for number in numbers}
        return [number for number in range(self.shards) if number not in intact]

    def write(
        self,
        missing: Sequence[int],
        preparation: Preparation,
        rows_of: Callable[[Prepared, int], Iterable[Rows]],
        reading: Reading,
        doing: str,
    ) -> TimeUse:
        """Write this process's part of the missing shards; the time is that of all, who wait for the last one.

        Batches never reach over the end of a shard, so that a resumed run makes the same ones.

        Args:
            rows_of: the rows of a batch for each of the files, in the files' order, in one piece or several; it is told
                the number of the batch among those of all shards of full size.
            doing: what is done, for the person who watches.
        """
        mine = missing[self.world.rank :: self.world.size]
        batches = {number: in_batches(self.positions(number), reading.batch_size) for number in mine}
        images = sum(len(self.positions(number)) for number in mine)
        clock, start = StageClock(), time.perf_counter()
        who = f", process {self.world.rank} of {self.world.size}" if self.world.size > 1 else ""
        # The workers are forked before the progress bar starts its thread.
        with (
            preparation.feed(
                [batch for number in mine for batch in batches[number]], reading, self.world.device
            ) as fed,
            clock.running(),
            progress(images, doing + who) as advance,
        ):
            for number in mine:
                # Every process adds up its own unreadable images to those in the shards that all have finished.
                known, skipped = self.skipped(), {}
                first = number * -(-len(self.positions(0)) // reading.batch_size)
                with self.shard(number) as shard:
                    for i, positions in enumerate(batches[number]):
                        with stage("decode"):
                            batch = next(fed)
                        skipped |= batch.skipped
                        reading.check_skipped([*known, *skipped.values()], sum(map(len, self._positions)))
                        for rows in rows_of(batch, first + i) if batch.ids else ():
                            with stage("write"):
                                shard.append(*rows)
                        advance(len(positions))
                    with stage("write"):
                        shard.finish(skipped)
        waited, seconds = clock.seconds(), time.perf_counter() - start
        return TimeUse.over(self.world.gather(TimeUse(seconds, images, waited, seconds)))

    def shard(self, number: int) -> ShardWriter:
        """A shard to be written, or to be written again."""
        return ShardWriter(self, number)

    def checked(self, *rows: Any) -> Rows:
        """The rows to append to each of the files; for a job that makes them of something else, and checks it."""
        return rows

    def fits(self, number: int, part: Part) -> bool:
        """Whether a record can be that of the shard."""
        inside = {position for position, _, _ in part.skipped} <= set(self.positions(number))
        return inside and sorted(part.files) == sorted(self.files(number))

    def record(self, number: int, part: Part) -> None:
        """Record a shard whose files are on disk. ValueError where it is not all there."""
        if not self.fits(number, part):
            wanted, skipped = len(self.positions(number)), len(part.skipped)
            raise ValueError(f"shard {number} is for {wanted} images, got {part.rows}, and {skipped} skipped")
        for folder in {(self.folder / name).parent for name in part.files}:
            sync_folder(folder)
        write_whole(self._part(number), json.dumps(asdict(part), indent=1))

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Errors of the operating system as DataError that says what is kept."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            cause = "the disk is full; free some space and run it again" if full else f"{error.strerror or error}"
            count = len(self.parts())
            kept = f"{count} of {self.shards} shards are kept, to go on from" if count else "nothing was kept"
            raise DataError(f"cannot write the {self.what} {self.place}: {cause} ({kept})") from error

    def _read_part(self, number: int) -> Part | None:
        try:
            part = read_record(self._part(number), Part)
        except UnreadableFile:
            return None  # damaged: the shard is made again
        return part if self.fits(number, part) else None

    def _part(self, number: int) -> Path:
        return self.folder / f"part_{number:05d}.json"


class ShardWriter:
    """One shard: appended to, then finished. Leaving the with block before that removes what was written."""

    def __init__(self, job: ShardedJob, number: int) -> None:
        self.job, self.number = job, number
        self._paths = [job.folder / name for name in job.files(number)]
        self._files: list[NpyWriter] = []
        self._opened = ExitStack()

    def __enter__(self) -> ShardWriter:
        with self.job.disk_errors():
            for path, (dtype, shape) in zip(self._paths, self.job.arrays.values(), strict=True):
                path.unlink(missing_ok=True)  # of a run that was killed
                self._files.append(self._opened.enter_context(NpyWriter(path, dtype, shape)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()
        for path in self._paths if self._files else ():
            path.unlink(missing_ok=True)

    def append(self, *rows: Any) -> None:
        """Add rows, for each of the files; what they are is the job's. DataError where the disk is full."""
        for file, some in zip(self._files, self.job.checked(*rows), strict=True):
            with self.job.disk_errors():
                file.append(some)

    def finish(self, skipped: Mapping[int, Skipped] | None = None) -> None:
        """Put the shard safely on disk and record it.

        Args:
            skipped: by position in the source, the images of the shard that were not appended.
        """
        listed = [(position, item.name, item.reason) for position, item in sorted((skipped or {}).items())]
        with self.job.disk_errors():
            files = {name: file.close() for name, file in zip(self.job.files(self.number), self._files, strict=True)}
            self.job.record(self.number, Part(files, self._files[0].rows, listed, self.job.provenance))
        self._files = []
