"""From the token cache to batches: which images an optimizer step sees is a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mapet.config import RunConfig
from mapet.data.feed import PATIENCE, Feed
from mapet.distributed import World
from mapet.errors import ConfigError
from mapet.rng import StepRng
from mapet.task import Batch, Data


@dataclass(frozen=True)
class Share:
    """The images of an optimizer step, and the part of them that one process takes."""

    seed: int
    step: int
    images: int
    """Of the whole step."""
    part: slice

    @property
    def rng(self) -> StepRng:
        """Of the step; draw for all `images`, and take `part`."""
        return StepRng(self.seed, self.step)

    def ids(self, length: int) -> Tensor:
        """The part's images, int64, out of `length`."""
        return step_ids(length, seed=self.seed, step=self.step, global_batch=self.images)[self.part]


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
    # The raw words of a bit generator never change between versions of numpy or torch; their shuffles may.
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(length)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


@dataclass(frozen=True)
class _Fetcher:
    """The number of a step to the batch that one process takes: its contiguous share of the global batch, in order."""

    data: Data
    seed: int
    images: int
    part: slice

    def __call__(self, step: int, beat: Callable[[], None]) -> Batch:
        share = Share(self.seed, step, self.images, self.part)
        return self.data.batch(share.ids(len(self.data)), share, beat)


def make_loader(
    data: Data,
    *,
    seed: int,
    global_batch: int,
    start_step: int,
    stop_step: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    patience: float = PATIENCE,
    stopped: Callable[[], bool] = lambda: False,
) -> Feed[Batch]:
    """Batches of this process for the optimizer steps [start_step, stop_step), one Batch per step, in order.

    The result is a context manager, which ends the workers; `patience`, `stopped` and errors on the way are Feed's.

    Neither the number of workers nor the step it starts from changes what a step gets, and no global random state is
    read or changed.

    Raises:
        ConfigError: more images in a batch than in the data, a batch that the processes cannot share evenly, a rank
            outside [0, world_size), or less shared memory than the workers need.
    """
    steps_per_epoch(len(data), global_batch)
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must be in [0, world size {world_size}), got {rank}")
    if global_batch % world_size:
        raise ConfigError(f"global batch {global_batch} is not divisible by the {world_size} processes")
    share = global_batch // world_size
    return Feed(
        _Fetcher(data, seed, global_batch, slice(rank * share, (rank + 1) * share)),
        range(start_step, stop_step),
        workers=workers,
        batch_bytes=share * data.image_bytes,
        patience=patience,
        stopped=stopped,
        pin_memory=torch.cuda.is_available(),
        prefix="data.",
    )


def run_batches(config: RunConfig, data: Data, world: World, steps: range, stopped: Callable[[], bool]) -> Feed[Batch]:
    """The batches that one process of a run takes in these steps; see `make_loader`."""
    return make_loader(
        data,
        seed=config.train.seed,
        global_batch=config.optim.global_batch,
        start_step=steps.start,
        stop_step=steps.stop,
        rank=world.rank,
        world_size=world.size,
        workers=config.data.workers,
        patience=config.data.patience,
        stopped=stopped,
    )
