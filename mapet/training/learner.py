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

import torch
from torch import Tensor

from mapet.config import RunConfig, to_dict
from mapet.data.augment import JitterDraws, color_jitter, step_jitter
from mapet.data.loader import Batch
from mapet.distributed import World
from mapet.errors import ConfigError, OutOfMemory
from mapet.files import check_like
from mapet.model.fp8 import check_fp8
from mapet.model.vit import Keep, load_official
from mapet.objectives import Objective, Plan, build_objective
from mapet.rng import (
    check_global_rng_state,
    global_rng_state,
    seed_global_generators,
    set_global_rng_state,
    step_generator,
)
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
from mapet.training.schedule import StepPlan, learning_rate
from mapet_kernels.backends import TWO_STREAM_BACKENDS, choose_backend
from mapet_kernels.registry import TwoStreamShape
from mapet_kernels.selfcheck import two_stream_agreement

LARGEST_SCALE = 2.0**128
"""Of the loss in fp16: no fp32 number is as large."""
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Failure:
    """The first step whose update was called off."""

    step: int
    loss: float
    gradient_norm: float


@dataclass(frozen=True)
class Numbers:
    """What happened since the last reading, over all processes; accuracy and norm are those of the last step."""

    steps: int
    loss: float
    accuracy: float
    gradient_norm: float
    loss_scale: float


class Learner:
    """An objective with its network, optimizer, loss scale and weight average: all that a checkpoint holds.

    The weights are drawn from config.train.seed. ConfigError when the device lacks the precision asked for.
    """

    def __init__(self, config: RunConfig, world: World, steps: StepPlan) -> None:
        check_precision(config.train.precision, world.device)
        check_attention(config, world.device)
        check_parallel(config, world)
        check_speed(config, world)
        train = config.train
        self.config, self.world, self.steps = config, world, steps
        seed_global_generators(train.seed)
        self.objective = build_objective(
            config.objective,
            config.model,
            backend=train.backend,
            recompute=train.recompute,
            speed=config.speed,
        )
        self.model = self.objective.model
        sharded = shards(config, world)
        if config.speed.compile:
            compile_network(self.objective, sharded=sharded)
        self.network = distribute(self.objective, world, sharded=sharded)
        self.optimizer = make_optimizer(self.objective, config.optim, fused=config.speed.fused_optimizer)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=train.precision == "fp16")
        self.average = WeightAverage(self.model, train.ema_decay) if train.ema_decay else None
        self.failure = torch.zeros(4, dtype=torch.float64, device=world.device)  # whether, step, loss, gradient norm
        self.last = torch.zeros(2, device=world.device)  # accuracy, gradient norm
        self.loss_sum, self.unread = torch.zeros((), device=world.device), 0
        self.skips = skips_dropped(config)
        self.graph: GraphedPass | None = None
        self.fits = False  # a step was done with this micro-batch

    def step(self, step: int, batch: Batch, *, with_accuracy: bool) -> None:
        """One optimizer step on this process's share of the global batch; OutOfMemory when it does not fit."""
        try:
            self._step(step, batch, with_accuracy)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(self._advice()) from error

    def _step(self, step: int, batch: Batch, with_accuracy: bool) -> None:
        batch = batch.to(self.world.device)
        plan, jitter = self._draw(step)
        while (sums := self._gradients(batch, plan, jitter, with_accuracy)) is None:
            self._halve_micro_batch()
        loss, accuracy = self.world.mean(sums / self.steps.accumulation)
        norm = self._update(step, loss)
        self.fits = True
        self.loss_sum, self.last, self.unread = self.loss_sum + loss, torch.stack([accuracy, norm]), self.unread + 1
        if not self.config.speed.wait_free:
            self.last.tolist()

    def read(self) -> Numbers:
        """The numbers since the last reading; the host waits for the device."""
        loss_sum, accuracy, norm = torch.cat([self.loss_sum[None], self.last]).tolist()
        steps, self.unread = self.unread, 0
        self.loss_sum = torch.zeros_like(self.loss_sum)
        scale = self.scaler.get_scale()
        return Numbers(steps, loss_sum / steps if steps else math.nan, accuracy, norm, scale)

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
            "objective": self._objective_extra(),
        }
        average = self.average.weights if self.average else None
        parts = (self.model.state_dict(), trainer, average)
        model, trainer, average = (gathered(part, keep=self.world.is_main) for part in parts)
        return CheckpointState(model, trainer, to_dict(self.config), average)

    def load(self, state: CheckpointState) -> None:
        """The inverse of `state`, for the same configuration. All of it is checked before any of it is used.

        ValueError names what is missing, or has another type, shape or range than it could have been saved with.
        """
        self._check(state)
        optimizer, scaler = state.trainer["optimizer"], state.trainer["scaler"]
        # Learning rate and the like follow from the configuration, so that they are not taken from the file.
        optimizer = {**optimizer, "param_groups": self.optimizer.state_dict()["param_groups"]}
        load_official(self.model, weights_as_parts(state.model, self.model.state_dict()))
        self.objective.load_state_dict(state.trainer["objective"], strict=False)
        self.optimizer.load_state_dict(optimizer_as_parts(optimizer, self.optimizer))
        self.scaler.load_state_dict(scaler)
        set_global_rng_state(state.trainer["random"], self.world.device)
        if self.average:
            self.average.load(state.ema)

    def _check(self, state: CheckpointState) -> None:
        check_like(state.model, self.model.state_dict(), "model")
        if self.average:
            check_like(state.ema, self.average.weights, "ema")
        names = ("optimizer", "scaler", "random", "objective")
        if missing := [name for name in names if name not in state.trainer]:
            raise ValueError(f"trainer lacks {missing[0]}")
        optimizer, scaler, random, extra = (state.trainer[name] for name in names)
        check_optimizer_state(optimizer, self.optimizer)
        check_like(scaler, self.scaler.state_dict(), "scaler")
        if scaler and not 0 < scaler["scale"] < LARGEST_SCALE:
            raise ValueError(f"scaler.scale must be positive and finite in fp32, got {scaler['scale']}")
        check_global_rng_state(random, self.world.device)
        check_like(extra, self._objective_extra(), "objective")

    def _objective_extra(self) -> dict[str, Tensor]:
        """What an objective holds besides the model."""
        return {name: value for name, value in self.objective.state_dict().items() if not name.startswith("model.")}

    def _draw(self, step: int) -> tuple[Plan, JitterDraws | None]:
        """This process's part of what is random in a step."""
        first = self.world.rank * self.steps.share
        mine = slice(first, first + self.steps.share)
        plan, jitter = draw_step(self.config, self.objective, step, self.world.device)
        if jitter is None or not self.config.speed.device_jitter:
            return plan[mine], None
        return plan[mine], jitter[mine].to(self.world.device)

    def _gradients(self, batch: Batch, plan: Plan, jitter: JitterDraws | None, with_accuracy: bool) -> Tensor | None:
        """Gradients of a step, from nothing, and sums of loss and accuracy (2,).

        None if some process ran out of memory and the step can be begun again.
        """
        self.optimizer.zero_grad(set_to_none=not self.config.speed.cuda_graphs)
        several, auto = self.world.size > 1, self.config.train.auto_batch
        trial = auto and several and not self.fits
        sums = None
        try:
            sums = self._accumulate(batch, plan, jitter, with_accuracy, reduces=not trial)
        except torch.OutOfMemoryError:
            if not auto or (several and not trial):  # in the latter case the others wait for this process's gradients
                raise
        if trial:
            if self.world.any(sums is None):
                return None
            self.world.mean_gradients(self.objective)
        return sums

    def _accumulate(
        self, batch: Batch, plan: Plan, jitter: JitterDraws | None, with_accuracy: bool, *, reduces: bool
    ) -> Tensor:
        """Add up the gradients of all micro-batches; the last one's backward pass averages them over the processes."""
        sums = torch.zeros(2, device=self.world.device)  # loss, accuracy
        for first in range(0, self.steps.share, self.steps.micro):
            part = slice(first, first + self.steps.micro)
            ends = reduces and part.stop == self.steps.share
            with reducing(self.network, ends):
                sums += self._pass(batch[part], plan[part], jitter and jitter[part], with_accuracy)
        return sums

    def _pass(self, batch: Batch, plan: Plan, jitter: JitterDraws | None, with_accuracy: bool) -> Tensor:
        """Forward and backward pass of a micro-batch: loss and accuracy (2,); a recording of it where that is wanted.

        Passes with accuracy are few, and not recorded.
        """
        keep = self._keep(plan)
        drawn = () if jitter is None else (jitter.factors, jitter.order)
        inputs = (batch.images, batch.tokens, plan.permutation, *drawn, *(() if keep is None else (keep,)))

        def run(images: Tensor, tokens: Tensor, permutation: Tensor, *others) -> Tensor:
            others = list(others)
            jitter = JitterDraws(others.pop(0), others.pop(0)) if drawn else None
            loss, accuracy = self._forward(images, tokens, permutation, jitter, *(others or [None]), with_accuracy)
            self.scaler.scale(loss / self.steps.accumulation).backward()
            return torch.stack([loss.detach(), accuracy])

        if not self.config.speed.cuda_graphs or with_accuracy:
            return run(*inputs)
        if self.graph is None:
            self.graph = GraphedPass(run, inputs, self.objective.parameters())
        return self.graph(*inputs)

    def _keep(self, plan: Plan) -> Tensor | tuple[Keep, ...] | None:
        """What the objective is told of dropped branches."""
        if not self.config.model.drop_path:
            return None
        if self.skips:
            return self.objective.kept(plan.keep, self.world.device)
        return plan.keep.to(self.world.device, non_blocking=True)

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

    def _forward(
        self,
        images: Tensor,
        tokens: Tensor,
        permutation: Tensor,
        jitter: JitterDraws | None,
        keep: Tensor | tuple[Keep, ...] | None,
        with_accuracy: bool,
    ) -> tuple[Tensor, Tensor]:
        images = images if jitter is None else color_jitter(images, jitter)
        dtype = AUTOCAST.get(self.config.train.precision)
        with torch.autocast(self.world.device.type, dtype, enabled=dtype is not None):
            return self.network(images, tokens, permutation, keep, with_accuracy)

    def _update(self, step: int, loss: Tensor) -> Tensor:
        """Clip, then update weights and their average unless something is not finite; the gradient norm."""
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.objective.parameters(), self.config.optim.clip)
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
        if self.average:
            self.average.update(self.model, skip)
        return norm


def draw_step(
    config: RunConfig, objective: Objective, step: int, device: torch.device
) -> tuple[Plan, JitterDraws | None]:
    """What is random in a step, for the whole global batch: the plan, and the colours if they change.

    Permutations are drawn on `device`; what is dropped and the colours on the host, which has to know them.
    """
    seed, batch, strength = config.train.seed, config.optim.global_batch, config.data.color_jitter
    host = step_generator(seed, step, "drop_path", "cpu")
    plan = objective.sample_plan(batch, step_generator(seed, step, "plan", device), device, host)
    return plan, step_jitter(seed, step, batch, strength) if strength else None


def skips_dropped(config: RunConfig) -> bool:
    """Whether the work of dropped images is left out: their number differs from step to step, which makes a program of
    its own of each when compiling, and which a recording cannot follow."""
    speed = config.speed
    return bool(speed.skip_dropped and config.model.drop_path and not speed.compile and not speed.cuda_graphs)


def check_speed(config: RunConfig, world: World) -> None:
    """ConfigError when a switch of config.speed cannot be on here."""
    if config.speed.fp8:
        check_fp8(world.device)
    if not config.speed.cuda_graphs:
        return
    if world.device.type != "cuda" or world.size > 1:
        here = f"{world.size} processes" if world.size > 1 else str(world.device)
        raise ConfigError(f"speed.cuda_graphs needs a GPU and one process, this run has {here}: leave it off")


def check_precision(precision: str, device: torch.device) -> None:
    """ConfigError when a GPU has no bf16 of its own; ValueError for auto, which precision.py settles before."""
    if precision == "auto":
        raise ValueError("train.precision auto is settled before a learner is made: mapet.training.precision.settled")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"train.precision bf16 needs a GPU of compute capability 8.0 or newer, {device} is older: fp16"
        )


def check_attention(config: RunConfig, device: torch.device) -> None:
    """ConfigError when the backend cannot run, or on this GPU, at this run's sizes, disagrees with plain torch."""
    if config.objective.name == "mim":
        return  # torch's own attention
    model, cut, backend = config.model, config.objective.cut, config.train.backend
    size, masks = model.width // model.heads, config.objective.name == "mapet"
    dtype = AUTOCAST.get(config.train.precision, torch.float32)
    try:
        choose_backend(backend, device, dtype, TWO_STREAM_BACKENDS, size)
    except ValueError as error:
        raise ConfigError(f"train.backend: {error}") from error
    if device.type != "cuda":
        return
    shape = TwoStreamShape(model.tokens, cut, batch=2, heads=2, size=size, mask_tokens=masks)
    agreement = two_stream_agreement(backend, device, dtype, shape)
    if not agreement.holds:
        raise ConfigError(
            f"train.backend {backend} computes wrong attention on {device}: its errors are {agreement.outputs:.1f} "
            f"(outputs) and {agreement.gradients:.1f} (gradients) times what rounding in {config.train.precision} "
            "explains; set train.backend sdpa, and please report this with the output of `mapet doctor`"
        )
