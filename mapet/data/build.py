"""Making a token cache from a source: the part that tokenising and importing have in common.

The work is shared out by shards: each process takes its part of those that are not finished, and the main process puts
the cache together. What a shard holds depends on neither the processes nor an interruption.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mapet.data.cache import TokenCache
from mapet.data.cache_writer import CacheWriter
from mapet.data.feed import PATIENCE
from mapet.data.images import ImageSource
from mapet.data.manifest import MANIFEST, CacheDescription
from mapet.data.prepare import Prepared, SkipLog, in_batches, prepared_batches
from mapet.data.progress import progress
from mapet.data.report import TimeUse, TokenizeReport
from mapet.data.stages import StageClock, stage
from mapet.distributed import World
from mapet.errors import ConfigError, DataError
from mapet.tokenizers.usage import CodebookUsage
from mapet.words import say


def build_cache(
    source: ImageSource,
    output: str | Path,
    description: CacheDescription,
    tokens_of: Callable[[Prepared], Tensor],
    *,
    prepare: Callable[[Image.Image], Tensor] | None = None,
    input_size: int = 0,
    batch_size: int = 64,
    workers: int = 2,
    patience: float = PATIENCE,
    max_skipped: float = 0.01,
    overwrite: bool = False,
    shard_images: int = 0,
    world: World | None = None,
    provenance: Mapping[str, str] | None = None,
) -> TokenizeReport:
    """Write the cache of a source, or go on with one that was begun, or reuse the one that is there.

    Args:
        description: what the cache will hold.
        tokens_of: gives the tokens (b, P) of a batch of decoded images.
        prepare: `Tokenizer.prepare`, where `tokens_of` needs `Prepared.inputs`; `input_size` is the side of these.
        workers: processes that decode, for each process of the world; `patience` seconds are the most for one image.
        max_skipped: largest fraction of unreadable images, over all processes.
        overwrite: replace a cache at `output`, even one that matches.
        shard_images: images of a shard, as in `mapet.data.cache_writer.shard_size`.
        world: the processes that share the work; this one alone where it is None.
        provenance: kept in the manifest.
    Returns:
        The report, the same in every process.
    Raises:
        DataError: too many unreadable images, another cache or something else at `output`, unfinished work of another
            kind beside it, disk full. Nothing is half-written; finished shards are kept to go on from.
    """
    if description.image_size % description.grid:
        raise ConfigError(
            f"image_size {description.image_size} is not divisible by the tokenizer's grid {description.grid}, "
            f"so a token would not stand for a whole patch"
        )
    if workers < 0:
        raise ConfigError(f"workers must not be negative, got {workers}")
    if shard_images < 0:
        raise ConfigError(f"shard_images must not be negative, got {shard_images}")
    in_batches((), batch_size)
    world = world or World(torch.device("cpu"))
    writer = CacheWriter(
        output,
        description,
        capacity=len(source),
        overwrite=overwrite,
        shard_images=shard_images,
        processes=world.size,
        provenance={**(provenance or {}), "batch_size": str(batch_size)},
    )
    log = SkipLog(len(source), max_skipped)
    job = _Job(source, writer, tokens_of, prepare, input_size, batch_size, workers, patience, log, world)
    if (report := world.on_main(lambda: job.reuse(Path(output)))) is not None:
        return report
    with closing(writer):
        try:
            found = world.on_main(writer.begin)
            job.say(found)
            missing = job.missing(found)
            used = job.write(missing[world.rank :: world.size])
            return world.on_main(lambda: job.finish(Path(output), used, resumed=writer.shards - len(missing)))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(job.where_it_stopped()) from None


@dataclass(frozen=True)
class _Job:
    """The steps of `build_cache`."""

    source: ImageSource
    writer: CacheWriter
    tokens_of: Callable[[Prepared], Tensor]
    prepare: Callable[[Image.Image], Tensor] | None
    input_size: int
    batch_size: int
    workers: int
    patience: float
    log: SkipLog
    world: World

    def reuse(self, output: Path) -> TokenizeReport | None:
        """The report of the cache that is at `output`; None where there is none, or it is to be replaced."""
        self.writer.sweep()
        if not os.path.exists(output / MANIFEST) or self.writer.overwrite:
            return None
        cache = TokenCache.open(output)
        cache.check_description(self.writer.description)
        self.log.add(cache.manifest.skipped)
        return TokenizeReport(output, len(cache), tuple(self.log.skipped), count_usage(cache), reused=True)

    def say(self, found: Sequence[int]) -> None:
        """What `begin` found, where that is anything."""
        if self.world.is_main and self.writer.dropped:
            say(f"dropped unfinished work in {self.writer.work}: {'; '.join(self.writer.dropped)}")
        if self.world.is_main and found:
            say(f"going on from {len(found)} of {self.writer.shards} shards in {self.writer.work}")

    def missing(self, found: Sequence[int]) -> list[int]:
        """Shards to be written; the processes share the checking of those found, and warn of damaged ones."""
        plans = self.world.gather(self.writer.journal.plan)
        for rank, plan in enumerate(plans):
            if differences := self.writer.journal.differences(plan):
                raise DataError(f"process {rank} has another job than process {self.world.rank}: {differences[0]}")
        damaged = []
        for number in found[self.world.rank :: self.world.size]:
            if damage := self.writer.damage(number):
                warnings.warn(f"shard {number} of {self.writer.work} is made again: {damage}", stacklevel=2)
                self.writer.journal.forget(number)
                damaged.append(number)
        intact = set(found) - {number for numbers in self.world.gather(damaged) for number in numbers}
        return [number for number in range(self.writer.shards) if number not in intact]

    def write(self, shards: Sequence[int]) -> TimeUse:
        """Write shards, one after the other; the time it took is that of all processes, who wait for the last one."""
        clock = StageClock()
        batches = [batch for number in shards for batch in self._batches(number)]
        images = sum(map(len, batches))
        start = time.perf_counter()
        # The workers are forked before the progress bar starts its thread.
        with (
            prepared_batches(
                self.source,
                batches,
                image_size=self.writer.description.image_size,
                prepare=self.prepare,
                input_size=self.input_size,
                workers=self.workers,
                pin_memory=self.world.device.type == "cuda",
                patience=self.patience,
            ) as prepared,
            clock.running(),
            progress(images, f"tokenising{self._who()}") as advance,
        ):
            for number in shards:
                self._write_shard(number, prepared, advance)
        waited = clock.seconds()
        seconds = time.perf_counter() - start
        return TimeUse.over(self.world.gather(TimeUse(seconds, images, waited, seconds)))

    def finish(self, output: Path, used: TimeUse, *, resumed: int) -> TokenizeReport:
        """Put the cache together; for the main process, when all shards are written."""
        shards, source = self.writer.finished(), self.source
        self.log.replace([item for shard in shards for item in shard.skipped])
        kept = [position for shard in shards for position in shard.kept]
        self.writer.finish(
            names=[source.names[position] for position in kept],
            labels=None if source.labels is None else source.labels[kept],
            classes=source.classes,
        )
        usage = count_usage(TokenCache.open(output))
        return TokenizeReport(
            output,
            len(kept),
            tuple(self.log.skipped),
            usage,
            reused=False,
            time=used,
            shards=self.writer.shards,
            resumed=resumed,
        )

    def where_it_stopped(self) -> str:
        """For the person who pressed Ctrl-C."""
        count = len(self.writer.journal.parts())
        if not count:
            return "stopped by Ctrl-C; what was unfinished has been removed"
        return f"stopped by Ctrl-C; the same command goes on from {count} of {self.writer.shards} shards"

    def _batches(self, number: int) -> list[Sequence[int]]:
        """Batches never reach over the end of a shard, so that a resumed run encodes the same ones."""
        return in_batches(self.writer.positions(number), self.batch_size)

    def _write_shard(self, number: int, prepared, advance: Callable[[int], None]) -> None:
        # Every process adds up its own unreadable images to those in the shards that all have finished.
        self.log.replace([item for shard in self.writer.finished() for item in shard.skipped])
        skipped = {}
        with self.writer.shard(number) as shard:
            for positions in self._batches(number):
                with stage("decode"):
                    batch = next(prepared)
                self.log.add(batch.skipped)
                unread = sorted(set(positions) - set(batch.ids))
                skipped |= zip(unread, batch.skipped, strict=True)
                if batch.ids:
                    tokens = self.tokens_of(batch).cpu()
                    with stage("write"):
                        shard.append(batch.crops, tokens)
                advance(len(positions))
            with stage("write"):
                shard.finish(skipped)

    def _who(self) -> str:
        return f", process {self.world.rank} of {self.world.size}" if self.world.size > 1 else ""


def count_usage(cache: TokenCache) -> CodebookUsage:
    """Usage of the codebook's entries by all tokens of a cache."""
    counts = torch.zeros(cache.vocabulary, dtype=torch.int64)
    for batch in in_batches(range(len(cache)), 65536):
        counts += torch.bincount(cache.tokens(batch).flatten(), minlength=len(counts))
    return CodebookUsage(counts.numpy())
