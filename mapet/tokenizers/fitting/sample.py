"""Features of a random sample of patches, in files: what a k-means over more than memory holds is fitted on.

The sample is k-CLIP's (aimagelab/MaPeT, data/kmeans): images in random order, in groups of 40, and of the vectors of
each group a fixed part at random. The folder:

    features_00007.npy   float16 (rows, F), the sample of 100 groups
    features.json        the files in order, with their hashes, and what they are a sample of; written last
    plan.json, part_*.json   the journal (mapet/data/jobs.py): a killed run goes on with the same call
    kmeans               state of the k-means over it, while that runs
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from mapet.checked import at_least
from mapet.data.feed import PATIENCE
from mapet.data.images import ImageSource
from mapet.data.jobs import Journal
from mapet.data.manifest import Skipped
from mapet.data.prepare import Prepared, SkipLog, in_batches, prepared_batches
from mapet.data.progress import progress
from mapet.data.report import TimeUse
from mapet.data.stages import StageClock, stage
from mapet.distributed import World
from mapet.errors import ConfigError, DataError
from mapet.files import FileRecord, NpyWriter, map_array, one_line, write_whole
from mapet.folders import SAMPLE, check_place
from mapet.rng import step_generator
from mapet.words import say
from mapet_kernels.kmeans import NpyRows

GROUP = 40
"""Images of which vectors are drawn together."""
GROUPS_OF_A_SHARD = 100
MAX_PATCHES = 5_000_000
"""Vectors to aim at: 2 % of those of ImageNet's 1,281,167 training images, as in the paper."""
MANIFEST = "features.json"
FORMAT = 1


@dataclass(frozen=True)
class SamplePlan:
    """Which vectors are kept: a function of these numbers alone.

    Attributes:
        source_images: in the source.
        images: of them to draw from.
        patches: vectors of an image, P.
        max_patches: vectors to aim at.
        seed: of the order of the images and of the vectors kept.
    """

    source_images: int
    images: int
    patches: int
    max_patches: int
    seed: int

    def __post_init__(self) -> None:
        if not self.rate:
            raise ConfigError(
                f"{self.max_patches} patches of {self.images} images are less than 0.05 % of their "
                f"{self.images * self.patches}; sample more patches, or fewer images"
            )

    @property
    def rate(self) -> float:
        """Part of a group's vectors that is kept, to three decimals as in the official code; at most 1."""
        return min(1.0, round(self.max_patches / (self.images * self.patches), 3))

    @property
    def expected_rows(self) -> int:
        """About how many vectors the sample will have."""
        return int(self.images * self.patches * self.rate)

    @cached_property
    def order(self) -> list[int]:
        """Positions in the source of the images, in the order in which they are read."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(self.source_images, generator=generator)[: self.images].tolist()

    def groups(self) -> list[list[int]]:
        """Positions in the source, by group."""
        return [list(group) for group in in_batches(self.order, GROUP)]

    def kept(self, group: int, readable: int) -> Tensor:
        """Ascending indices of the vectors kept of a group with so many readable images, of readable * P; int64."""
        vectors = readable * self.patches
        drawn = torch.randperm(vectors, generator=step_generator(self.seed, group, "patches"))
        return drawn[: int(vectors * self.rate)].sort().values


@dataclass(frozen=True)
class FeatureFiles:
    """A complete sample.

    Attributes:
        folder: where it is.
        files: records of the .npy files, by name, in order.
        rows: vectors in each.
        features: numbers in a vector, F.
        images, patches: readable images, and all their vectors, that the sample is of.
        skipped: the images that could not be read.
        time: of the run that completed it.
    """

    folder: Path
    files: dict[str, FileRecord]
    rows: list[int]
    features: int
    images: int
    patches: int
    skipped: list[Skipped]
    time: TimeUse

    @property
    def paths(self) -> list[Path]:
        """The .npy files in order."""
        return [self.folder / name for name in self.files]

    def open(self) -> NpyRows:
        """All vectors, read when they are needed. DataError names a file that is damaged."""
        try:
            found = NpyRows(self.paths)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read the features in {self.folder}: {one_line(error)}") from error
        if found.shape != (sum(self.rows), self.features):
            wanted = (sum(self.rows), self.features)
            raise DataError(f"the features in {self.folder} are of shape {found.shape}, their records say {wanted}")
        return found

    def load(self) -> Tensor:
        """All vectors, (n, F) float16, in memory."""
        rows = torch.empty(sum(self.rows), self.features, dtype=torch.float16)
        for part, path, count in zip(rows.split(self.rows), self.paths, self.rows, strict=True):
            part.copy_(torch.from_numpy(np.array(map_array(path, np.float16, (count, self.features)))))
        return rows

    def summary(self) -> str:
        """One line of text."""
        size = sum(record.bytes for record in self.files.values())
        return (
            f"{self.folder}: {sum(self.rows)} of {self.patches} patches of {self.images} images, {size / 1e9:.2f} GB; "
            f"{self.time.images_per_second:.1f} images/s"
        )


def sample_features(
    source: ImageSource,
    tokenizer,
    folder: str | Path,
    *,
    seed: int = 1234,
    limit: int = 0,
    max_patches: int = MAX_PATCHES,
    batch_size: int = 64,
    workers: int = 2,
    patience: float = PATIENCE,
    max_skipped: float = 0.01,
    world: World | None = None,
) -> FeatureFiles:
    """Write the features of a random sample of the patches of a source; go on with, or reuse, what is in the folder.

    Workers, batch size, processes and interruptions do not change which vectors are kept.

    Args:
        tokenizer: a `mapet.tokenizers.Tokenizer`, fitted or not.
        limit: draw from so many images, themselves drawn at random; 0 for all.
        max_patches: about how many vectors to keep; the part kept is rounded to 0.1 %.
        batch_size: images of a pass through the network, at most a group of 40.
        patience: seconds that a worker may take for one image.
    Returns:
        The sample, the same in every process.
    Raises:
        ConfigError: limit is negative, or so few patches that the part rounds to nothing.
        DataError: too many unreadable images, features that float16 does not hold, the folder holds other things or
            another sample, or the disk is full.
    """
    if limit < 0:
        raise ConfigError(f"limit must not be negative, got {limit}")
    check_place(folder, SAMPLE, option="--features-dir")
    world = world or World(torch.device("cpu"))
    images = min(limit or len(source), len(source))
    plan = SamplePlan(len(source), images, tokenizer.grid**2, max_patches, seed)
    job = _Job(source, tokenizer, Path(folder), plan, min(batch_size, GROUP), workers, patience, max_skipped, world)
    try:
        with job.disk_errors():
            found = world.on_main(job.begin)
            missing = job.missing(found)
            used = job.write(missing[world.rank :: world.size])
            return world.on_main(lambda: job.finish(used))
    finally:
        job.journal.end()


@dataclass(frozen=True)
class ShardFacts:
    """What the record of a file says of it: vectors, readable images, and the others."""

    rows: Annotated[int, at_least(0)]
    images: Annotated[int, at_least(0)]
    skipped: list[Skipped]


@dataclass(frozen=True)
class _Job:
    """The steps of `sample_features`."""

    source: ImageSource
    tokenizer: Any
    folder: Path
    plan: SamplePlan
    batch_size: int
    workers: int
    patience: float
    max_skipped: float
    world: World

    @cached_property
    def journal(self) -> Journal:
        settings = {name: value for name, value in self.tokenizer.settings().items() if name != "vocabulary"}
        network = self.tokenizer.network
        made_from = {
            "format": FORMAT,
            "tokenizer": self.tokenizer.name,
            **settings,
            "network": network and network.sha256,
            "source_fingerprint": self.source.fingerprint(),
            "group": GROUP,
        }
        return Journal(
            self.folder,
            {**made_from, **asdict(self.plan), "rate": self.plan.rate},
            SAMPLE,
            ("features_*.npy", MANIFEST, "kmeans"),
            parts=len(self.shards()),
            files=lambda number: (_file_name(number),),
            facts=ShardFacts,
        )

    @cached_property
    def groups(self) -> list[list[int]]:
        return self.plan.groups()

    @cached_property
    def log(self) -> SkipLog:
        return SkipLog(self.plan.images, self.max_skipped)

    def begin(self) -> list[int]:
        with self.disk_errors():
            self.journal.begin()
        found = list(self.journal.parts())
        if found:
            say(f"going on from {len(found)} of {len(self.shards())} files in {self.folder}")
        return found

    def shards(self) -> list[range]:
        """Numbers of the groups of each shard."""
        return in_batches(range(len(self.groups)), GROUPS_OF_A_SHARD)

    def missing(self, found: Sequence[int]) -> list[int]:
        """Shards to be written; the processes share the checking of those found."""
        parts, damaged = self.journal.parts(), []
        for number in found[self.world.rank :: self.world.size]:
            if damage := self.journal.damage(parts[number]):
                warnings.warn(f"{self.folder}: {damage}, and is made again", stacklevel=2)
                self.journal.forget(number)
                damaged.append(number)
        intact = set(found) - {number for numbers in self.world.gather(damaged) for number in numbers}
        return [number for number in range(len(self.shards())) if number not in intact]

    def write(self, numbers: Sequence[int]) -> TimeUse:
        shards = self.shards()
        groups = [group for number in numbers for group in shards[number]]
        clock, start = StageClock(), time.perf_counter()
        images = sum(len(self.groups[group]) for group in groups)
        # The workers are forked before the progress bar starts its thread.
        with (
            prepared_batches(
                self.source,
                [self.groups[group] for group in groups],
                prepare=self.tokenizer.prepare,
                input_size=self.tokenizer.input_size,
                workers=self.workers,
                pin_memory=self.world.device.type == "cuda",
                patience=self.patience,
            ) as prepared,
            torch.inference_mode(),
            clock.running(),
            progress(images, "features for the fit") as advance,
        ):
            for number in numbers:
                self._write_shard(number, shards[number], prepared, advance)
        waited = clock.seconds()
        seconds = time.perf_counter() - start
        return TimeUse.over(self.world.gather(TimeUse(seconds, images, waited, seconds)))

    def finish(self, used: TimeUse) -> FeatureFiles:
        """Write the manifest; for the main process, when all shards are written."""
        parts = self.journal.parts()
        self.log.replace([skipped for part in parts.values() for skipped in part.facts.skipped])
        files = {name: record for part in parts.values() for name, record in part.files.items()}
        found = FeatureFiles(
            folder=self.folder,
            files=files,
            rows=[part.facts.rows for part in parts.values()],
            features=self.tokenizer.feature_size,
            images=sum(part.facts.images for part in parts.values()),
            patches=sum(part.facts.images for part in parts.values()) * self.plan.patches,
            skipped=list(self.log.skipped),
            time=used,
        )
        shards = [
            {"name": name, "rows": rows, **asdict(record)}
            for (name, record), rows in zip(files.items(), found.rows, strict=True)
        ]
        values = {
            **self.journal.plan,
            "dtype": "float16",
            "features": found.features,
            "rows": sum(found.rows),
            "readable_images": found.images,
            "skipped": [asdict(skipped) for skipped in found.skipped],
            "shards": shards,
        }
        with self.disk_errors():
            write_whole(self.folder / MANIFEST, json.dumps(values, indent=1))
        return found

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"cannot write features into {self.folder}: {error.strerror or error}; finished files are kept, and "
                "the same command goes on from them"
            ) from error

    def _write_shard(
        self, number: int, groups: range, prepared: Iterator[Prepared], advance: Callable[[int], None]
    ) -> None:
        # Every process adds up its own unreadable images to those in the shards that all have finished.
        self.log.replace([skipped for part in self.journal.parts().values() for skipped in part.facts.skipped])
        path, images, skipped = self.folder / _file_name(number), 0, []
        path.unlink(missing_ok=True)  # of a run that was killed
        with NpyWriter(path, np.float16, (self.tokenizer.feature_size,)) as file:
            for group in groups:
                with stage("decode"):
                    batch = next(prepared)
                self.log.add(batch.skipped)
                for rows in self._vectors(group, batch):
                    with stage("write"):
                        file.append(rows)
                images += len(batch.ids)
                skipped += batch.skipped
                advance(len(self.groups[group]))
            with stage("write"):
                facts = ShardFacts(file.rows, images, skipped)
                self.journal.finish(number, {path.name: file.close()}, facts)

    def _vectors(self, group: int, batch: Prepared) -> Iterator[np.ndarray]:
        """The vectors kept of a group, float16 (n, F), one array for each pass through the network."""
        kept = self.plan.kept(group, len(batch.ids))
        for first in range(0, len(batch.ids), self.batch_size):
            inputs = batch.inputs[first : first + self.batch_size]
            start, end = (self.plan.patches * i for i in (first, first + len(inputs)))
            here = kept[(kept >= start) & (kept < end)] - start
            with stage("network", self.tokenizer.device):
                features = self.tokenizer.features(inputs.to(self.tokenizer.device, non_blocking=True)).flatten(0, 1)
                chosen = features[here.to(features.device)].half()
            rows = chosen.cpu().numpy()
            if not np.isfinite(rows).all():
                raise DataError(
                    f"tokenizer {self.tokenizer.name} gives features that are not finite in float16; check its weights"
                )
            yield rows


def _file_name(number: int) -> str:
    return f"features_{number:05d}.npy"
