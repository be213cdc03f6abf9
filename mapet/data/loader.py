"""From the data to batches: which images an optimizer step sees is a pure function of seed and step.

Steps count up from 0. The batches of held-out images have numbers too, from -1 down and the same after every epoch:
what is drawn for batch -1 comes from (seed, -1), so that all epochs are judged alike, and on draws that no step has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mapet.config import RunConfig
from mapet.data.feed import Feed
from mapet.distributed import World
from mapet.errors import ConfigError
from mapet.rng import StepRng, step_seed
from mapet.task import Batch, Data


@dataclass(frozen=True)
class Split:
    """The images that a run learns from, and those that it is only judged on, drawn from the seed image by image."""

    images: int
    """Of the data."""
    seed: int
    held: int = 0
    """Of the images, held out."""

    def __reduce__(self):
        return Split, (self.images, self.seed, self.held)  # workers draw anew what is long

    @property
    def trained(self) -> int:
        """Images to learn from."""
        return self.images - self.held

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        order = _shuffled(self.images, step_seed(self.seed, 0, "held_out"))
        held, rest = order[: self.held], order[self.held :]
        return torch.from_numpy(np.sort(rest)), torch.from_numpy(np.sort(held))

    def among(self, *, held_out: bool) -> Tensor | None:
        """Which images are held out, or are learned from: int64, sorted; None for all."""
        return self._parts[held_out] if self.held else None

    def trained_ids(self, step: int, global_batch: int) -> Tensor:
        """Images of the whole global batch of an optimizer step, int64 (global_batch,)."""
        ids = step_ids(self.trained, seed=self.seed, step=step, global_batch=global_batch)
        return self._parts[False][ids] if self.held else ids


@dataclass(frozen=True)
class Share:
    """The images of an optimizer step or of a batch of held-out images, and the part of them that one process takes."""

    seed: int
    step: int
    images: int
    """Of the whole step."""
    part: slice
    among: Tensor | None = None
    """The images that it takes its own from, int64, sorted: those to learn from, or the held-out ones. None for all."""

    @property
    def rng(self) -> StepRng:
        """Of the step; draw for all `images`, and take `part`."""
        return StepRng(self.seed, self.step)

    @property
    def held_out(self) -> bool:
        """Whether a run is judged on these images, and does not learn from them: no augmentation."""
        return self.step < 0


def split_images(images: int, config: RunConfig) -> Split:
    """All but a share of data.held_out is learned from; at least one image is held out where that is not 0."""
    share = config.data.held_out
    return Split(images, config.train.seed, max(1, round(share * images)) if share else 0)


def steps_per_epoch(length: int, global_batch: int) -> int:
    """Whole batches in `length` images; the rest of an epoch is dropped. ConfigError if there is not even one."""
    if not 1 <= global_batch <= length:
        raise ConfigError(f"global batch {global_batch} must be from 1 to the number of images, {length}")
    return length // global_batch


def step_ids(length: int, *, seed: int, step: int, global_batch: int) -> Tensor:
    """Images of the whole global batch of an optimizer step, counted from 0 over all epochs.

    Every epoch goes through its own permutation of all images, drawn from (seed, epoch).

    Returns:
        int64 (global_batch,).
    Raises:
        ConfigError: global_batch is larger than length, or seed or step is negative.
    """
    epoch, within = divmod(step, steps_per_epoch(length, global_batch))
    if seed < 0 or step < 0:
        raise ConfigError(f"seed and step must not be negative, got {seed} and {step}")
    first = within * global_batch
    return torch.from_numpy(_permutation(length, seed, epoch)[first : first + global_batch].copy())


@lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return _shuffled(length, [seed, epoch])


def _shuffled(length: int, entropy: int | list[int]) -> np.ndarray:
    # The raw words of a bit generator never change between versions of numpy or torch; their shuffles may.
    words = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(length)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


@dataclass(frozen=True)
class _Fetcher:
    """The number of a batch to what one process takes of it: its contiguous share, in order."""

    data: Data
    split: Split
    images: int
    part: slice

    def __call__(self, number: int, beat: Callable[[], None]) -> Batch:
        among = self.split.among(held_out=number < 0)
        share = Share(self.split.seed, number, self.images, self.part, among)
        ids = self._trained(number) if number >= 0 else self._held_out(number, among)
        return self.data.batch(ids, share, beat)

    def _trained(self, step: int) -> Tensor:
        return self.split.trained_ids(step, self.images)[self.part]

    def _held_out(self, number: int, among: Tensor) -> Tensor:
        """A process whose part of the last batch is empty gets one image of it, which counts for nothing."""
        first = (-1 - number) * self.images
        ids = among[first : first + self.images]
        return ids[self.part] if self.part.start < len(ids) else ids[:1]


def make_loader(
    data: Data,
    *,
    seed: int,
    global_batch: int,
    start_step: int,
    stop_step: int,
    rank: int = 0,
    world_size: int = 1,
    **feed: Any,
) -> Feed[Batch]:
    """Batches of this process for the optimizer steps [start_step, stop_step), one Batch per step, in order.

    The result is a context manager, which ends the workers; `feed` are options of Feed: `workers` (0 by default),
    `patience`, `stopped`. Errors on the way are Feed's too.

    Neither the number of workers nor the step it starts from changes what a step gets, and no global random state is
    read or changed.

    Raises:
        ConfigError: more images in a batch than in the data, a batch that the processes cannot share evenly, a rank
            outside [0, world_size), or less shared memory than the workers need.
    """
    fetcher = _Fetcher(data, Split(len(data), seed), global_batch, _part(global_batch, rank, world_size))
    return _feed(fetcher, range(start_step, stop_step), **feed)


def run_batches(
    config: RunConfig, data: Data, world: World, numbers: Collection[int], stopped: Callable[[], bool]
) -> Feed[Batch]:
    """The batches of these numbers, as one process of a run takes them; see the top of the file and `make_loader`."""
    batch = config.optim.global_batch
    split, part = split_images(len(data), config), _part(batch, world.rank, world.size)
    return _feed(
        _Fetcher(data, split, batch, part),
        numbers,
        workers=config.data.workers,
        patience=config.data.patience,
        stopped=stopped,
    )


def _part(global_batch: int, rank: int, world_size: int) -> slice:
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must be in [0, world size {world_size}), got {rank}")
    if global_batch % world_size:
        raise ConfigError(f"global batch {global_batch} is not divisible by the {world_size} processes")
    share = global_batch // world_size
    return slice(rank * share, (rank + 1) * share)


def _feed(fetcher: _Fetcher, numbers: Collection[int], *, workers: int = 0, **feed: Any) -> Feed[Batch]:
    steps_per_epoch(fetcher.split.trained, fetcher.images)
    return Feed(
        fetcher,
        numbers,
        workers=workers,
        batch_bytes=(fetcher.part.stop - fetcher.part.start) * fetcher.data.image_bytes,
        pin_memory=torch.cuda.is_available(),
        prefix="data.",
        **feed,
    )
