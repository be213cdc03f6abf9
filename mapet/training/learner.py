"""What a run learns, and one optimizer step of it.

Nothing in a step makes the host wait for the device: losses add up on the device until `read`. In fp32 and bf16 a loss
or gradient that is not finite calls off, on the device, its own update and all later ones, so that the weights stay as
they were before it until the host reads of it. In fp16 the step is skipped and the loss scale halved.

With train.auto_batch, a step whose micro-batch does not fit the memory is begun again with smaller ones; it is the same
step, since its randomness is drawn for the whole batch. Several processes agree on that in the first step with a
micro-batch, and only there, since they would wait for each other's gradients otherwise.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mapet.config import RunConfig, to_dict
from mapet.distributed import World
from mapet.errors import ConfigError, OutOfMemory
from mapet.files import check_like
from mapet.model.fp8 import check_fp8
from mapet.objectives import build_task
from mapet.rng import (
    StepRng,
    check_global_rng_state,
    global_rng_state,
    seed_global_generators,
    set_global_rng_state,
)
from mapet.task import Batch
from mapet.training.checkpoint import CheckpointState
from mapet.training.graphs import GraphedPass
from mapet.training.limits import advice, halved
from mapet.training.optim import WeightAverage, check_optimizer_state, clip_gradients, gated_step, make_optimizer
from mapet.training.parallel import (
    check_parallel,
    compile_network,
    distribute,
    gathered,
    optimizer_as_parts,
    reducing,
    shards,
    weights_as_parts,
)
from mapet.training.precision import AUTOCAST, check_precision
from mapet.training.schedule import StepPlan, learning_rate

LARGEST_SCALE = 2.0**128
"""Of the loss in fp16: no fp32 number is as large."""


@dataclass(frozen=True)
class Failure:
    """The first step whose update was called off."""

    step: int
    loss: float
    gradient_norm: float


@dataclass(frozen=True)
class Numbers:
    """What happened since the last reading, over all processes; `metrics` and the norm are those of the last step."""

    steps: int
    loss: float
    metrics: dict[str, float]
    gradient_norm: float
    loss_scale: float


class Learner:
    """A task with its optimizer, loss scale and weight average: all that a checkpoint holds.

    The weights are drawn from config.train.seed. ConfigError when the device lacks what is asked for.
    """

    def __init__(self, config: RunConfig, world: World, steps: StepPlan) -> None:
        check_precision(config.train.precision, world.device)
        check_parallel(config, world)
        check_speed(config, world)
        train = config.train
        self.config, self.world, self.steps = config, world, steps
        self.dtype = AUTOCAST.get(train.precision)
        seed_global_generators(train.seed)
        self.task = build_task(config)
        self.task.check(world.device, self.dtype or torch.float32)
        sharded = shards(config, world)
        if config.speed.compile:
            compile_network(self.task, sharded=sharded)
        self.network = distribute(self.task, world, sharded=sharded)
        self.optimizer = make_optimizer(self.task.parameter_groups(config.optim), config.optim)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=train.precision == "fp16")
        self.average = WeightAverage(self.task, train.ema_decay) if train.ema_decay else None
        self.failure = torch.zeros(4, dtype=torch.float64, device=world.device)  # whether, step, loss, gradient norm
        self.last: dict[str, Tensor] = {}
        self.loss_sum, self.unread = torch.zeros((), device=world.device), 0
        self.graph: GraphedPass | None = None
        self.fits = False  # a step was done with this micro-batch

    def step(self, step: int, batch: Batch, *, metrics: bool) -> None:
        """One optimizer step on this process's share of the global batch; OutOfMemory when it does not fit.

        metrics: whether what the task logs besides the loss is computed, for `read`.
        """
        try:
            self._step(step, batch, metrics)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(self._advice()) from error

    def _step(self, step: int, batch: Batch, metrics: bool) -> None:
        device = self.world.device
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        first = self.world.rank * self.steps.share
        draws = self.task.draw(self.config.optim.global_batch, StepRng(self.config.train.seed, step, device))
        draws = part_of(draws, slice(first, first + self.steps.share))
        while (sums := self._gradients(batch, draws, metrics)) is None:
            self._halve_micro_batch()
        means = dict(zip(sums, self.world.mean(torch.stack(list(sums.values()))).unbind(), strict=True))
        norm = self._update(step, means["loss"])
        self.fits = True
        self.loss_sum, self.unread = self.loss_sum + means.pop("loss"), self.unread + 1
        self.last = {**means, "gradient_norm": norm}

    def read(self) -> Numbers:
        """The numbers since the last reading; the host waits for the device."""
        names = ("loss", *self.last)
        numbers = dict(zip(names, torch.stack([self.loss_sum, *self.last.values()]).tolist(), strict=True))
        steps, self.unread = self.unread, 0
        self.loss_sum = torch.zeros_like(self.loss_sum)
        loss, norm = numbers.pop("loss"), numbers.pop("gradient_norm", math.nan)
        return Numbers(steps, loss / steps if steps else math.nan, numbers, norm, self.scaler.get_scale())

    def failed(self) -> Failure | None:
        """The first step whose update was called off in fp32 or bf16, if any; the host waits for the device."""
        happened, step, loss, norm = self.failure.tolist()
        return Failure(int(step), loss, norm) if happened else None

    def state(self) -> CheckpointState:
        """Everything needed to go on exactly; in the main process only where weights are sharded.

        All processes call it. Tensors are not copied, but for those that are sharded: these are made whole on the CPU.
        """
        trainer = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": global_rng_state(self.world.device),
        }
        average = self.average.weights if self.average else None
        parts = (self.task.state_dict(), trainer, average)
        task, trainer, average = (gathered(part, keep=self.world.is_main) for part in parts)
        return CheckpointState(task, trainer, to_dict(self.config), average)

    def load(self, state: CheckpointState) -> None:
        """The inverse of `state`, for the same configuration. All of it is checked before any of it is used.

        ValueError names what is missing, or has another type, shape or range than it could have been saved with.
        """
        self._check(state)
        optimizer, scaler = state.trainer["optimizer"], state.trainer["scaler"]
        # Learning rate and the like follow from the configuration, so that they are not taken from the file.
        optimizer = {**optimizer, "param_groups": self.optimizer.state_dict()["param_groups"]}
        self.task.load_state_dict(weights_as_parts(state.task, self.task.state_dict()))
        self.optimizer.load_state_dict(optimizer_as_parts(optimizer, self.optimizer))
        self.scaler.load_state_dict(scaler)
        set_global_rng_state(state.trainer["random"], self.world.device)
        if self.average and state.ema is not None:
            self.average.load(state.ema)

    def _check(self, state: CheckpointState) -> None:
        check_like(state.task, self.task.state_dict(), "task")
        if self.average:
            check_like(state.ema, self.average.weights, "ema")
        names = ("optimizer", "scaler", "random")
        if missing := [name for name in names if name not in state.trainer]:
            raise ValueError(f"trainer lacks {missing[0]}")
        optimizer, scaler, random = (state.trainer[name] for name in names)
        check_optimizer_state(optimizer, self.optimizer)
        check_like(scaler, self.scaler.state_dict(), "scaler")
        if scaler and not 0 < scaler["scale"] < LARGEST_SCALE:
            raise ValueError(f"scaler.scale must be positive and finite in fp32, got {scaler['scale']}")
        check_global_rng_state(random, self.world.device)

    def _gradients(self, batch: Batch, draws: dict[str, Tensor], metrics: bool) -> dict[str, Tensor] | None:
        """Gradients of a step, from nothing, and the means of what the task says of this process's images.

        None if some process ran out of memory and the step can be begun again.
        """
        self.optimizer.zero_grad(set_to_none=not self.config.speed.cuda_graphs)
        several, auto = self.world.size > 1, self.config.train.auto_batch
        trial = auto and several and not self.fits
        means = None
        try:
            means = self._accumulate(batch, draws, metrics, reduces=not trial)
        except torch.OutOfMemoryError:
            if not auto or (several and not trial):  # in the latter case the others wait for this process's gradients
                raise
        if trial:
            if self.world.any(means is None):
                return None
            self.world.mean_gradients(self.task)
        return means

    def _accumulate(self, batch: Batch, draws: dict[str, Tensor], metrics: bool, *, reduces: bool) -> dict[str, Tensor]:
        """Add up the gradients of all micro-batches; the last one's backward pass averages them over the processes."""
        means: dict[str, Tensor] = {}
        for first in range(0, self.steps.share, self.steps.micro):
            part = slice(first, first + self.steps.micro)
            ready = self.task.ready(part_of(draws, part), self.world.device)
            with reducing(self.network, reduces and part.stop == self.steps.share):
                for name, value in self._pass(part_of(batch, part), ready, metrics).items():
                    means[name] = means.get(name, 0) + value / self.steps.accumulation
        return means

    def _pass(self, batch: Batch, draws: dict[str, Any], metrics: bool) -> dict[str, Tensor]:
        """Forward and backward pass of a micro-batch; a recording of it where that is wanted.

        Passes with metrics are few, and not recorded.
        """
        if not self.config.speed.cuda_graphs or metrics:
            return self._forward_backward(batch, draws, metrics)
        names = list(batch), list(draws)

        def run(*tensors: Tensor) -> Tensor:
            images, drawn = tensors[: len(names[0])], tensors[len(names[0]) :]
            batch, draws = dict(zip(names[0], images, strict=True)), dict(zip(names[1], drawn, strict=True))
            return self._forward_backward(batch, draws, metrics=False)["loss"]

        inputs = (*batch.values(), *draws.values())
        if self.graph is None:
            self.graph = GraphedPass(run, inputs, self.task.parameters())
        return {"loss": self.graph(*inputs)}

    def _forward_backward(self, batch: Batch, draws: dict[str, Any], metrics: bool) -> dict[str, Tensor]:
        with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype is not None):
            values = self.network(batch, draws, metrics=metrics)
        self.scaler.scale(values["loss"] / self.steps.accumulation).backward()
        return {name: value.detach().float() for name, value in values.items()}

    def _halve_micro_batch(self) -> None:
        """Take smaller micro-batches from now on; OutOfMemory where they cannot be smaller."""
        micro = halved(self.steps.micro, self.steps.share)
        if not micro:
            raise OutOfMemory(self._advice())
        if self.world.is_main:
            warnings.warn(
                f"out of memory with micro-batch {self.steps.micro}: going on with {micro}, same batch", stacklevel=2
            )
        self.optimizer.zero_grad(set_to_none=True)
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        self.steps, self.fits, self.graph = replace(self.steps, micro=micro), False, None

    def _advice(self) -> str:
        return advice(self.config, self.world.device, self.world.size, self.steps.micro)

    def _update(self, step: int, loss: Tensor) -> Tensor:
        """Clip, then update weights and their average unless something is not finite; the gradient norm."""
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.task.parameters(), self.config.optim.clip)
        broken = ~(torch.isfinite(loss) & torch.isfinite(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optim, self.steps.per_epoch, step)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            skip = broken.float()
        else:
            values = torch.stack([torch.ones_like(loss), torch.full_like(loss, step), loss, norm]).double()
            self.failure = torch.where(broken & (self.failure[0] == 0), values, self.failure)
            skip = self.failure[0].float()
            gated_step(self.optimizer, skip)
        self.task.after_update(step, skip)
        if self.average:
            self.average.update(self.task, skip)
        return norm


def part_of(tensors: dict[str, Tensor], images: slice) -> dict[str, Tensor]:
    """Some images of a batch or of draws."""
    return {name: value[images] for name, value in tensors.items()}


def check_speed(config: RunConfig, world: World) -> None:
    """ConfigError when a switch of config.speed cannot be on here."""
    if config.speed.fp8:
        check_fp8(world.device)
    if not config.speed.cuda_graphs:
        return
    if world.device.type != "cuda" or world.size > 1:
        here = f"{world.size} processes" if world.size > 1 else str(world.device)
        raise ConfigError(f"speed.cuda_graphs needs a GPU and one process, this run has {here}: leave it off")
