"""A run that ends in time: measure its steps, then set epochs and warm-up, once and for all.

The decision is kept beside the checkpoints, in budget.json, and a run that goes on keeps it: the schedule of the
learning rate cannot change under way. The time counts from the first start.

    epochs = floor((budget (1 - MARGIN) - time spent) / (steps of an epoch * seconds of a step)) - cooldown_epochs
    warm-up = the configured one, a fifth of the epochs at most

Seconds of a step are those of the real steps of a learner that is thrown away, data included, after a few that warm up.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated

import torch

from mapet.checked import at_least
from mapet.config import RunConfig
from mapet.data.feed import FeedStopped
from mapet.data.loader import run_batches
from mapet.distributed import StopRequest, World
from mapet.errors import CheckpointError, ConfigError
from mapet.files import UnreadableFile, read_record, write_whole
from mapet.task import Data
from mapet.training.learner import Learner
from mapet.training.schedule import StepPlan
from mapet.units import duration, parse_duration
from mapet.words import say

FILE = "budget.json"
MARGIN = 0.05
"""Part of the time left for checkpoints, reports, and steps that are slower than those measured."""

WARM_UP_STEPS = 5
MEASURED_SECONDS = 60.0
WARM_UP_PART = 5
"""At most one in so many epochs warms up."""


@dataclass(frozen=True)
class Decision:
    """What was set, and from what."""

    budget: str
    started: Annotated[float, at_least(0, 2**37)]
    """Unix time of the first start."""
    seconds_per_step: Annotated[float, at_least(0, 2**37)]
    steps_per_epoch: Annotated[int, at_least(1)]
    epochs: Annotated[int, at_least(1)]
    warmup_epochs: Annotated[int, at_least(0)]

    def __post_init__(self) -> None:
        parse_duration(self.budget)

    def __str__(self) -> str:
        ends = datetime.fromtimestamp(self.started + parse_duration(self.budget))
        return (
            f"budget {self.budget}: {self.epochs} epochs, {self.warmup_epochs} of them warm-up, "
            f"{self.steps_per_epoch} steps of {duration(self.seconds_per_step)} each, {100 * MARGIN:.0f} % to spare; "
            f"to end by {ends:%Y-%m-%d %H:%M}"
        )


@dataclass(frozen=True)
class Clocks:
    """Where time is read: `wall` goes on while nothing runs, `steady` never jumps."""

    wall: Callable[[], float] = time.time
    steady: Callable[[], float] = time.perf_counter


def budgeted(
    config: RunConfig,
    world: World,
    data: Data,
    steps: StepPlan,
    clocks: Clocks | None = None,
    stop: StopRequest | None = None,
) -> tuple[RunConfig, Decision]:
    """The configuration with the epochs and warm-up that its budget allows: those decided earlier, or measured now.

    ConfigError when not even one epoch fits; CheckpointError when budget.json cannot be read. A signal noted by `stop`
    ends the measurement as it would end the process.
    """
    clocks, path = clocks or Clocks(), config.train.output / FILE
    decision = world.on_main(lambda: read(path) if config.train.resume else None)
    if decision is None:
        if world.is_main:
            say(f"budget {config.train.budget}: measuring steps for {MEASURED_SECONDS:.0f} s to see what fits")
        started = clocks.wall()
        seconds = measure(config, world, data, steps, clocks, stop or StopRequest(world))
        decision = world.on_main(lambda: _decided(config, path, steps, seconds, started, clocks))
    optim = replace(config.optim, epochs=decision.epochs, warmup_epochs=decision.warmup_epochs)
    return replace(config, optim=optim), decision


def measure(config: RunConfig, world: World, data: Data, steps: StepPlan, clocks: Clocks, stop: StopRequest) -> float:
    """Seconds of an optimizer step, over MEASURED_SECONDS; what they learn is thrown away."""
    learner = Learner(config, world, steps)
    began = 0.0
    with run_batches(config, data, world, range(2**31), lambda: bool(stop.received)) as batches:
        for step in count():
            stop.raise_if_received("measuring for train.budget")
            try:
                batch = next(batches)
            except FeedStopped:
                continue
            learner.step(step, batch, metrics=False)
            learner.read()  # waits for the device
            if step + 1 < WARM_UP_STEPS:
                continue
            if step + 1 == WARM_UP_STEPS:
                began = clocks.steady()
                continue
            spent = clocks.steady() - began
            if world.on_main(partial(operator.ge, spent, MEASURED_SECONDS)):
                break
    if world.device.type == "cuda":
        del learner
        torch.cuda.empty_cache()
    return spent / (step + 1 - WARM_UP_STEPS)


def decide(config: RunConfig, steps: StepPlan, seconds: float, started: float, now: float) -> Decision:
    """Epochs and warm-up for steps of so many seconds; see the top of the file. ConfigError when no epoch fits."""
    budget, cooldown = config.train.budget, config.optim.cooldown_epochs
    left = parse_duration(budget) * (1 - MARGIN) - (now - started)
    # A batch of held-out images counts as a step, though it takes a forward pass only.
    epoch = (steps.per_epoch + steps.held_out) * seconds
    epochs = int(left / epoch) - cooldown
    if epochs < 1:
        least = ((1 + cooldown) * epoch + now - started) / (1 - MARGIN)
        raise ConfigError(
            f"train.budget {budget} is too short: an epoch takes {duration(epoch)} here ({steps.per_epoch} steps of "
            f"{duration(seconds)}); give at least {duration(least)}, more GPUs or a smaller model"
        )
    warmup = min(config.optim.warmup_epochs, epochs // WARM_UP_PART)
    return Decision(budget, started, seconds, steps.per_epoch, epochs, warmup)


def read(path: Path) -> Decision | None:
    """The decision of an earlier start, if there was one."""
    try:
        return read_record(path, Decision)
    except UnreadableFile as error:
        if error.missing:
            return None
        raise CheckpointError(
            f"{path} cannot be read: {error.reason}; start afresh with `mapet pretrain --fresh`"
        ) from error


def _decided(
    config: RunConfig, path: Path, steps: StepPlan, seconds: float, started: float, clocks: Clocks
) -> Decision:
    decision = decide(config, steps, seconds, started, clocks.wall())
    try:
        write_whole(path, json.dumps(dataclasses.asdict(decision), indent=1))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    return decision
