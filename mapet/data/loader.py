"""From the token cache to batches: which images an optimizer step sees is a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mapet.data.augment import color_jitter as change_colors
from mapet.data.augment import step_jitter
from mapet.data.cache import TokenCache
from mapet.data.feed import PATIENCE, Feed
from mapet.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """Images with their tokens.

    Attributes:
        images: uint8 (b, 3, S, S), or float32 in [0, 1] with their colours changed already.
        tokens: int64 (b, P).
        ids: int64 (b,), positions in the cache.
    """

    images: Tensor
    tokens: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(self.images[part], self.tokens[part], self.ids[part])

    def to(self, device: torch.device | str) -> Batch:
        """On a device; the copy from pinned memory does not wait."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in (self.images, self.tokens, self.ids)))

    def pin_memory(self) -> Batch:
        """In page-locked memory; the DataLoader calls this."""
        return Batch(self.images.pin_memory(), self.tokens.pin_memory(), self.ids.pin_memory())


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
class _BatchFetcher:
    """The number of a step to the Batch that one process takes: its contiguous share of the global batch, in order."""

    cache: TokenCache
    seed: int
    global_batch: int
    mine: slice
    color_jitter: float

    @property
    def bytes(self) -> int:
        """Of a Batch, about."""
        pixels = 3 * self.cache.image_size**2 * (4 if self.color_jitter else 1)
        return (self.mine.stop - self.mine.start) * (pixels + 8 * (self.cache.grid**2 + 1))

    def __call__(self, step: int, beat: Callable[[], None]) -> Batch:
        ids = step_ids(len(self.cache), seed=self.seed, step=step, global_batch=self.global_batch)[self.mine]
        images = self.cache.images(ids, beat)
        if self.color_jitter:
            draws = step_jitter(self.seed, step, self.global_batch, self.color_jitter)
            images = change_colors(images, draws[self.mine])
        return Batch(images, self.cache.tokens(ids), ids)


def make_loader(
    cache: TokenCache,
    *,
    seed: int,
    global_batch: int,
    start_step: int,
    stop_step: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    color_jitter: float = 0.0,
    patience: float = PATIENCE,
    stopped: Callable[[], bool] = lambda: False,
) -> Feed[Batch]:
    """Batches of this process for the optimizer steps [start_step, stop_step), one Batch per step, in order.

    The result is a context manager, which ends the workers; `patience`, `stopped` and errors on the way are Feed's.

    Neither the number of workers nor the step it starts from changes what a step gets, and no global random state is
    read or changed. With `color_jitter` (its strength) the workers change the images' colours, as `step_jitter` drew.

    Raises:
        ConfigError: more images in a batch than in the cache, a batch that the processes cannot share evenly, a rank
            outside [0, world_size), or less shared memory than the workers need.
    """
    steps_per_epoch(len(cache), global_batch)
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must be in [0, world size {world_size}), got {rank}")
    if global_batch % world_size:
        raise ConfigError(f"global batch {global_batch} is not divisible by the {world_size} processes")
    share = global_batch // world_size
    fetch = _BatchFetcher(cache, seed, global_batch, slice(rank * share, (rank + 1) * share), color_jitter)
    return Feed(
        fetch,
        range(start_step, stop_step),
        workers=workers,
        batch_bytes=fetch.bytes,
        patience=patience,
        stopped=stopped,
        pin_memory=torch.cuda.is_available(),
        prefix="data.",
    )
