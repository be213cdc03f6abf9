"""From the data to batches: which images an optimizer step sees is a pure function of seed and step.

Steps count up from 0. The batches of held-out images have numbers too, from -1 down and the same after every epoch:
what is drawn for batch -1 comes from (seed, -1), so that all epochs are judged alike, and on draws that no step has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
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
    """The images that a run learns from, and those that it is only judged on."""

    trained: int
    ids: Tensor | None = None
    """int64, sorted; None where all images are learned from, in which case none is held out."""
    held_out: Tensor | None = None
    """int64, sorted."""

    def trained_ids(self, *, seed: int, step: int, global_batch: int) -> Tensor:
        """Images of the whole global batch of an optimizer step, int64 (global_batch,)."""
        ids = step_ids(self.trained, seed=seed, step=step, global_batch=global_batch)
        return ids if self.ids is None else self.ids[ids]

    def held_out_batches(self, global_batch: int) -> int:
        """Batches that the held-out images make, the last of which may be smaller."""
        return 0 if self.held_out is None else -(-len(self.held_out) // global_batch)


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
    """Which images a run learns from: all but a share of data.held_out, at least one where that is not 0.

    Which ones is drawn from the seed, image by image.
    """
    if not config.data.held_out:
        return Split(images)
    return _split(images, config.train.seed, max(1, round(config.data.held_out * images)))


@lru_cache(maxsize=2)
def _split(images: int, seed: int, held_out: int) -> Split:
    order = _shuffled(images, step_seed(seed, 0, "held_out"))
    held, rest = (torch.from_numpy(np.sort(part)) for part in (order[:held_out], order[held_out:]))
    return Split(len(rest), rest, held)


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
    seed: int
    images: int
    part: slice

    def __call__(self, number: int, beat: Callable[[], None]) -> Batch:
        held_out = number < 0
        among = self.split.held_out if held_out else self.split.ids
        share = Share(self.seed, number, self.images, self.part, among)
        return self.data.batch(self._held_out(number) if held_out else self._trained(number), share, beat)

    def _trained(self, step: int) -> Tensor:
        return self.split.trained_ids(seed=self.seed, step=step, global_batch=self.images)[self.part]

    def _held_out(self, number: int) -> Tensor:
        """A process whose part of the last batch is empty gets one image of it, which counts for nothing."""
        first = (-1 - number) * self.images
        ids = self.split.held_out[first : first + self.images]
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
    fetcher = _Fetcher(data, Split(len(data)), seed, global_batch, _part(global_batch, rank, world_size))
    return _feed(fetcher, range(start_step, stop_step), **feed)


def run_batches(
    config: RunConfig, data: Data, world: World, numbers: Collection[int], stopped: Callable[[], bool]
) -> Feed[Batch]:
    """The batches of these numbers, as one process of a run takes them; see the top of the file and `make_loader`."""
    batch = config.optim.global_batch
    split, part = split_images(len(data), config), _part(batch, world.rank, world.size)
    return _feed(
        _Fetcher(data, split, config.train.seed, batch, part),
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
