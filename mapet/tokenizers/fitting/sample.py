"""Features of a random sample of patches, in files: what every codebook is fitted on.

The sample is k-CLIP's (aimagelab/MaPeT, data/kmeans): images in random order, in groups of 40, and of the vectors of
each group a fixed part at random. The folder:

    features_00007.npy   float16 (rows, F), the sample of 100 groups
    features.json        the files in order, with their hashes, and what they are a sample of; written last
    plan.json, part_*.json   the records of the job (mapet/data/jobs.py): a killed run goes on with the same call
    kmeans               state of the k-means over it, while that runs
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mapet.data.images import ImageSource
from mapet.data.jobs import Preparation, Prepared, Reading, Rows, ShardedJob, in_batches
from mapet.data.manifest import Skipped
from mapet.data.stages import TimeUse, stage
from mapet.distributed import World
from mapet.errors import ConfigError, DataError
from mapet.files import FileRecord, one_line, write_whole
from mapet.folders import SAMPLE
from mapet.rng import step_generator
from mapet_kernels.kmeans import NpyRows

GROUP = 40
"""Images of which vectors are drawn together."""
GROUPS_OF_A_SHARD = 100
MAX_PATCHES = 5_000_000
"""Vectors to aim at: 2 % of those of ImageNet's 1,281,167 training images, as in the paper."""
MANIFEST, STATE = "features.json", "kmeans"
OWN_FILES = ("plan.json", "part_*.json", "features_*.npy", MANIFEST, STATE)
BEFORE = "sample.json"
"""What an unfinished fit of earlier versions had in place of all these."""
FORMAT = 2


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

    @cached_property
    def order(self) -> list[int]:
        """Positions in the source of the images, in the order in which they are read."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(self.source_images, generator=generator)[: self.images].tolist()

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
        rows: vectors in all of them.
        features: numbers in a vector, F.
        images, patches: readable images, and all their vectors, that the sample is of.
        skipped: the images that could not be read.
        time: of the run that completed it.
    """

    folder: Path
    files: dict[str, FileRecord]
    rows: int
    features: int
    images: int
    patches: int
    skipped: list[Skipped]
    time: TimeUse

    def open(self) -> NpyRows:
        """All vectors, read when they are needed. DataError names a file that is damaged."""
        try:
            found = NpyRows([self.folder / name for name in self.files])
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read the features in {self.folder}: {one_line(error)}") from error
        if found.shape != (wanted := (self.rows, self.features)):
            raise DataError(f"the features in {self.folder} are of shape {found.shape}, their records say {wanted}")
        return found

    def summary(self) -> str:
        """One line of text."""
        size = sum(record.bytes for record in self.files.values())
        return (
            f"{self.folder}: {self.rows} of {self.patches} patches of {self.images} images, {size / 1e9:.2f} GB; "
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
    restart: bool = False,
    world: World | None = None,
    **reading: Any,
) -> FeatureFiles:
    """Write the features of a random sample of the patches of a source; go on with, or reuse, what is in the folder.

    Workers, batch size, processes and interruptions do not change which vectors are kept.

    Args:
        tokenizer: a `mapet.tokenizers.Tokenizer`, fitted or not.
        limit: draw from so many images, themselves drawn at random; 0 for all.
        max_patches: about how many vectors to keep; the part kept is rounded to 0.1 %.
        restart: delete another sample in the folder instead of refusing it.
        reading: fields of `mapet.data.jobs.Reading`; batch_size is that of a pass through the network.
    Returns:
        The sample, the same in every process.
    Raises:
        ConfigError: limit is negative, or so few patches that the part rounds to nothing.
        DataError: too many unreadable images, features that float16 does not hold, the folder holds other things or
            another sample, or the disk is full.
    """
    if limit < 0:
        raise ConfigError(f"limit must not be negative, got {limit}")
    folder, how = Path(folder), Reading(**reading)
    if (folder / BEFORE).exists():
        raise DataError(
            f"{folder} holds an unfinished fit of an earlier version of mapet ({BEFORE}), which this one cannot go on "
            "with: delete that folder"
        )
    images = min(limit or len(source), len(source))
    plan = SamplePlan(len(source), images, tokenizer.grid**2, max_patches, seed)
    network = tokenizer.network
    made_from = {
        "format": FORMAT,
        "tokenizer": tokenizer.name,
        **{name: value for name, value in tokenizer.settings().items() if name != "vocabulary"},
        "network": network and network.sha256,
        "source_fingerprint": source.fingerprint(),
        "group": GROUP,
    }
    job = ShardedJob(
        folder,
        {**made_from, **asdict(plan), "rate": plan.rate},
        in_batches(plan.order, GROUP * GROUPS_OF_A_SHARD),
        {"features_{}.npy": (np.float16, (tokenizer.feature_size,))},
        SAMPLE,
        names=(MANIFEST, STATE),
        world=world,
    )

    @torch.inference_mode()
    def rows_of(group: Prepared, number: int) -> Iterator[Rows]:
        kept = plan.kept(number, len(group.ids))
        for first in range(0, len(group.ids), how.batch_size):
            inputs = group.inputs[first : first + how.batch_size]
            start, end = (plan.patches * i for i in (first, first + len(inputs)))
            here = kept[(kept >= start) & (kept < end)] - start
            with stage("network", tokenizer.device):
                features = tokenizer.features(inputs.to(tokenizer.device, non_blocking=True)).flatten(0, 1)
                rows = features[here.to(features.device)].half().cpu().numpy()
            if not np.isfinite(rows).all():
                raise DataError(
                    f"tokenizer {tokenizer.name} gives features that are not finite in float16; check its weights"
                )
            yield (rows,)

    try:
        with job.disk_errors():
            missing = job.missing(job.world.on_main(lambda: job.begin(restart=restart)))
            preparation = Preparation(source, prepare=tokenizer.prepare, input_size=tokenizer.input_size)
            groups = dataclasses.replace(how, batch_size=GROUP)
            used = job.write(missing, preparation, rows_of, groups, "features for the fit")
            return job.world.on_main(lambda: _complete(job, how, plan, tokenizer.feature_size, used))
    finally:
        job.end(remove=job.world.size == 1 and not job.parts())


def _complete(job: ShardedJob, how: Reading, plan: SamplePlan, features: int, used: TimeUse) -> FeatureFiles:
    """Write features.json; for the main process, when all shards are written."""
    parts, skipped = job.parts().values(), job.skipped()
    how.check_skipped(skipped, plan.images)
    files = {name: record for part in parts for name, record in part.files.items()}
    images, rows = plan.images - len(skipped), [part.rows for part in parts]
    shards = [
        {"name": name, "rows": count, **asdict(record)}
        for (name, record), count in zip(files.items(), rows, strict=True)
    ]
    made = {"dtype": "float16", "features": features, "rows": sum(rows), "readable_images": images}
    listed = [asdict(item) for item in skipped]
    values = {**job.plan, **made, "skipped": listed, "shards": shards}
    write_whole(job.folder / MANIFEST, json.dumps(values, indent=1))
    return FeatureFiles(job.folder, files, sum(rows), features, images, images * plan.patches, skipped, used)
