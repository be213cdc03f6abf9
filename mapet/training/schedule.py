"""How a run divides into steps, and the learning rate of each.

The rate: linear warm-up, then a cosine whose clock starts with the first step (not after the warm-up).

With e the time in epochs, W = warmup_epochs, E = epochs (the official pre-training schedule):

    e < W:       lr = warmup_lr + e (base - warmup_lr) / W
    W <= e < E:  lr = min_lr + (base - min_lr) (1 + cos(pi e / E)) / 2
    e >= E:      lr = min_lr                                              (cooldown_epochs of them)

The official code moves e once per epoch (`schedule_per="epoch"`); here e moves with every step unless told otherwise.
Since the clock runs through the warm-up, the largest rate is a little below base (0.997 base for E = 300, W = 10).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mapet.config import OptimConfig, RunConfig
from mapet.data.loader import split_images
from mapet.errors import ConfigError


@dataclass(frozen=True)
class StepPlan:
    """Steps of a run, and the images of one step in one process."""

    per_epoch: int
    last: int
    """Optimizer steps of the whole run, max_steps considered."""
    share: int
    """Images of one process in a step."""
    micro: int
    """Images of one forward pass."""
    held_out: int = 0
    """Batches of held-out images that the run is judged on, after every epoch and its last step."""

    @property
    def accumulation(self) -> int:
        """Forward passes in a step."""
        return self.share // self.micro


def plan_steps(config: RunConfig, images: int, processes: int) -> StepPlan:
    """How a run over `images` images, held-out ones included, divides. The rest of an epoch is dropped.

    ConfigError when the global batch is larger than the data, or processes or micro-batches do not divide it.
    """
    batch, micro, split = config.optim.global_batch, config.train.micro_batch, split_images(images, config)
    if batch > split.trained:
        besides = f" beside the {images - split.trained} of data.held_out" if images > split.trained else ""
        raise ConfigError(
            f"optim.global_batch {batch} is larger than the data, {split.trained} images{besides}; lower it"
        )
    if batch % processes:
        raise ConfigError(f"optim.global_batch {batch} is not divisible by the number of processes, {processes}")
    share, per_epoch = batch // processes, split.trained // batch
    if micro and share % micro:
        raise ConfigError(
            f"train.micro_batch {micro} does not divide {share}, the images of one process in a step "
            f"(optim.global_batch {batch} over {processes} processes)"
        )
    total = (config.optim.epochs + config.optim.cooldown_epochs) * per_epoch
    last = min(total, config.train.max_steps or total)
    return StepPlan(per_epoch, last, share, micro or share, split.held_out_batches(batch))


def learning_rate(optim: OptimConfig, steps_per_epoch: int, step: int) -> float:
    """The rate of optimizer step `step` (0 is the first)."""
    epoch = step / steps_per_epoch if optim.schedule_per == "step" else step // steps_per_epoch
    if epoch < optim.warmup_epochs:
        return optim.warmup_lr + epoch * (optim.lr - optim.warmup_lr) / optim.warmup_epochs
    if epoch < optim.epochs:
        return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * epoch / optim.epochs))
    return optim.min_lr
