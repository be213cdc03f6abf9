"""Learning rate: linear warm-up, then a cosine whose clock starts with the first step (not after the warm-up).

With e the time in epochs, W = warmup_epochs, E = epochs (the official pre-training schedule):

    e < W:       lr = warmup_lr + e (base - warmup_lr) / W
    W <= e < E:  lr = min_lr + (base - min_lr) (1 + cos(pi e / E)) / 2
    e >= E:      lr = min_lr                                              (cooldown_epochs of them)

The official code moves e once per epoch (`schedule_per="epoch"`); here e moves with every step unless told otherwise.
Since the clock runs through the warm-up, the largest rate is a little below base (0.997 base for E = 300, W = 10).
"""

from __future__ import annotations

import math

from mapet.config import OptimConfig


def learning_rate(optim: OptimConfig, steps_per_epoch: int, step: int) -> float:
    """The rate of optimizer step `step` (0 is the first)."""
    epoch = step / steps_per_epoch if optim.schedule_per == "step" else step // steps_per_epoch
    if epoch < optim.warmup_epochs:
        return optim.warmup_lr + epoch * (optim.lr - optim.warmup_lr) / optim.warmup_epochs
    if epoch < optim.epochs:
        return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * epoch / optim.epochs))
    return optim.min_lr


def total_steps(optim: OptimConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a whole run, cooldown included."""
    return (optim.epochs + optim.cooldown_epochs) * steps_per_epoch
