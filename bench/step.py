"""One optimizer step of MaPeT as `mapet pretrain` takes it, beside the official way on the same weights and draws.

Ways: `ours`, `ours_compiled`, `official` (its masks built beforehand) and `official_with_masks` (masks built on the
step's own cores, where the official code builds them in data workers). All draw the same permutations and drop-path,
jitter the same images or none, clip, and update by the same fused AdamW. They are checked for one loss, one gradient
norm and equal clipped gradients in the first step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import options
from bench.contest import Arena, Contest, Entrant, timed_call
from bench.official_way import OfficialWay, batch_masks
from bench.roofline import Cost
from bench.timing import Clock
from mapet.config import DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig, TrainConfig
from mapet.data.augment import JitterDraws, color_jitter
from mapet.data.loader import Batch
from mapet.distributed import World
from mapet.objectives import Plan, build_objective
from mapet.rng import seed_global_generators
from mapet.training.learner import AUTOCAST, Learner, draw_step
from mapet.training.limits import halved
from mapet.training.optim import clip_gradients, make_optimizer
from mapet.training.schedule import StepPlan
from mapet.units import parse_bytes
from mapet_kernels.backends import TWO_STREAM_BACKENDS, choose_backend

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}
"""Largest difference of losses (nats), and relative difference of gradient norms; of gradients, ten times as much."""
CYCLE = 4
"""Steps whose draws are taken in turn, so that masks can be built beforehand for all of them."""
FINITE_WITHIN = 12
"""Steps within which fp16's loss scale must have come down from 65536 to one without overflow."""
BACKWARD = {"products": 2.0, "attention": 2.5, "embedding": 1.0}
"""FLOP of the backward pass to those of the forward pass; images need no gradient."""


@dataclass(frozen=True)
class StepResults:
    """What a step gives: loss (nats), gradient norm before clipping, and gradients after it, by name.

    tolerance: where it is not that of the dtype.
    """

    loss: float
    gradient_norm: float
    gradients: dict[str, Tensor]
    tolerance: float | None = None


@dataclass(frozen=True)
class Setting:
    """A step to measure, and where."""

    sizes: options.Sizes
    device: torch.device
    jitter: float = 0.4
    memory: str = ""
    compile: bool = True
    backend: str = "auto"

    @cached_property
    def config(self) -> RunConfig:
        """The configuration of our way; every switch of section speed at its default."""
        return RunConfig(
            model=self.sizes.model,
            objective=ObjectiveConfig(cut=self.sizes.cut),
            data=DataConfig(color_jitter=self.jitter),
            optim=OptimConfig(global_batch=self.sizes.batch),
            train=TrainConfig(
                precision=self.sizes.dtype,
                device=str(self.device),
                backend=self.backend,
                gpu_memory=self.memory,
                auto_batch=bool(self.memory),
            ),
        )

    @cached_property
    def plan(self) -> StepPlan:
        """A run long enough that the learning rate stays that of the warm-up's start."""
        return StepPlan(per_epoch=100_000, last=1_000_000, share=self.sizes.batch, micro=self.sizes.batch)

    @cached_property
    def batch(self) -> Batch:
        """Random images and tokens on the device."""
        generator = torch.Generator().manual_seed(0)
        count, model = self.sizes.batch, self.sizes.model
        shape = (count, 3, model.image_size, model.image_size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        tokens = torch.randint(0, model.vocabulary, (count, model.patches), generator=generator)
        return Batch(images, tokens, torch.arange(count)).to(self.device)


def contests(chosen: options.Options, device: torch.device) -> list[Contest]:
    """One for each combination of sizes."""
    return [
        contest(Setting(sizes, device, chosen.jitter, chosen.gpu_memory, chosen.compile, chosen.backend))
        for sizes in options.combinations(chosen, device)
    ]


def contest(setting: Setting) -> Contest:
    """Ours against the official way."""
    ways = ("ours", *(("ours_compiled",) if setting.compile else ()), "official", "official_with_masks")
    cap = f" {setting.memory} cap" if setting.memory else ""
    backend = f" {setting.backend} attention" if setting.backend != "auto" else ""
    size, dtype = setting.sizes.model.head_size, options.DTYPES[setting.sizes.dtype]
    taken = choose_backend(setting.backend, setting.device, dtype, TWO_STREAM_BACKENDS, size)
    sizes = setting.sizes.record() | {"jitter": setting.jitter, "gpu_memory": setting.memory, "backend": taken}
    return Contest(
        "step", setting.sizes.name + backend + cap, sizes, ("step",), ways, "ours", setting.sizes.dtype,
        partial(arena, setting),
    )  # fmt: skip


@contextmanager
def arena(setting: Setting) -> Iterator[Arena]:
    """The shared batch, and the builders of the ways."""
    judge = Judge(setting.sizes.dtype)
    compiled = replace(setting.config, speed=replace(setting.config.speed, compile=True))
    yield Arena(
        {
            "ours": lambda: ours(setting, setting.config),
            "ours_compiled": lambda: ours(setting, compiled),
            "official": lambda: official(setting, masks_built=False),
            "official_with_masks": lambda: official(setting, masks_built=True),
        },
        judge,
        {"step": Cost(setting.sizes.batch * flop_per_image(setting.sizes.model, setting.sizes.cut), 0)},
        setting.sizes.batch,
    )
    if setting.memory:
        torch.cuda.set_per_process_memory_fraction(1.0, setting.device)


class Judge:
    """Holds results against those it saw first, which have to be finite."""

    def __init__(self, dtype: str) -> None:
        self.tolerance, self.first = TOLERANCE[dtype], None

    def __call__(self, results: StepResults) -> dict[str, float]:
        """Errors of loss, gradient norm and gradients, in units of what is allowed."""
        if self.first is None:
            self.first = results
            finite = math.isfinite(results.loss) and math.isfinite(results.gradient_norm)
            return {"finite": 0.0 if finite else math.inf}
        limit, first = results.tolerance or self.tolerance, self.first
        worst = max(relative_difference(g, first.gradients[name]) for name, g in results.gradients.items())
        return {
            "loss": abs(results.loss - first.loss) / limit,
            "gradient_norm": abs(results.gradient_norm / first.gradient_norm - 1) / limit,
            "gradients": worst / (10 * limit),
        }


def relative_difference(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| of whole tensors; 0 where both are 0."""
    a, b = a.float().cpu(), b.float().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item() if a.any() or b.any() else 0.0


def ours(setting: Setting, config: RunConfig) -> Entrant:
    """A learner as `mapet pretrain` makes it."""
    learner = Learner(config, World(setting.device), setting.plan)
    limit = MemoryCap(setting, lambda: resident(learner.objective, learner.optimizer))
    steps = itertools.cycle(range(CYCLE))

    def step(number: int | None = None) -> None:
        with limit:
            learner.step(next(steps) if number is None else number, setting.batch, with_accuracy=False)

    def results() -> StepResults:
        def once() -> tuple[float, float]:
            step(0)
            numbers = learner.read()
            return numbers.loss, numbers.gradient_norm

        return first_finite(once, learner.objective)

    return Entrant(
        timed_call("step", step, settling(setting)), results, step, limit.resident,
        lambda: {"micro_batch": learner.steps.micro},
    )  # fmt: skip


def official(setting: Setting, *, masks_built: bool) -> Entrant:
    """The official way; `masks_built`: within the timed step."""
    peer = OfficialStep(setting)
    limit = MemoryCap(setting, lambda: resident(peer.objective, peer.optimizer))
    steps = itertools.cycle(range(CYCLE))
    masks = [] if masks_built else [peer.masks(number) for number in range(CYCLE)]

    def step(number: int, made: Sequence[Tensor] | None) -> None:
        with limit:
            peer.step(number, peer.masks(number) if made is None else made)

    def once() -> None:
        number = next(steps)
        step(number, None if masks_built else masks[number])

    def sample(clock: Clock) -> dict[str, float]:
        number = next(steps)
        made = None if masks_built else [mask.to(setting.device) for mask in masks[number]]
        for _ in range(settling(setting)):
            step(number, made)
        return {"step": clock.time(lambda: step(number, made))[1]}

    def results() -> StepResults:
        def first() -> tuple[float, float]:
            step(0, None if masks_built else masks[0])
            return peer.loss.item(), peer.norm.item()

        return first_finite(first, peer.objective)

    return Entrant(sample, results, once, limit.resident, lambda: {"micro_batch": peer.micro})


class OfficialStep:
    """The step around `OfficialWay`, with the learner's own draws, jitter, loss scale, clipping and optimizer."""

    def __init__(self, setting: Setting) -> None:
        config = setting.config
        self.setting, self.config, self.micro = setting, config, setting.sizes.batch
        seed_global_generators(config.train.seed)
        self.objective = build_objective(config.objective, config.model).to(setting.device)
        self.network = OfficialWay(self.objective.model)
        self.optimizer = make_optimizer(self.objective, config.optim)
        self.scaler = torch.amp.GradScaler(setting.device.type, enabled=config.train.precision == "fp16")
        self.loss = self.norm = torch.zeros(())
        for group in self.optimizer.param_groups:
            group["lr"] = config.optim.warmup_lr

    def draw(self, step: int) -> tuple[Plan, JitterDraws | None]:
        """Permutations, drop-path and colours of a step, as the learner draws them."""
        return draw_step(self.config, self.objective, step, self.setting.device)

    def masks(self, step: int) -> tuple[Tensor, ...]:
        """What the official data workers send for a step, on the CPU."""
        return batch_masks(self.draw(step)[0].permutation.cpu(), self.config.objective.cut, self.config.model.heads)

    def step(self, step: int, masks: Sequence[Tensor]) -> None:
        """One optimizer step; where the memory ends, with smaller micro-batches from then on."""
        plan, jitter = self.draw(step)
        images = self.setting.batch.images
        images = images / 255 if jitter is None else color_jitter(images, jitter.to(images.device))
        tokens = self.setting.batch.tokens
        self.update(normalised(self.objective.model, images), tokens, masks, self.keep(plan))

    def keep(self, plan: Plan) -> Tensor | None:
        """Factors of the residual branches, on the device; None where nothing is dropped."""
        return plan.keep.to(self.setting.device) if self.config.model.drop_path else None

    def update(self, images: Tensor, tokens: Tensor, masks: Sequence[Tensor], keep: Tensor | None) -> None:
        """Gradients, clipping and update from what data workers send: normalised images, tokens and masks."""
        while not self.gradients(images, tokens, masks, keep):
            self.micro = halved(self.micro, len(images))
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        self.scaler.unscale_(self.optimizer)
        self.norm = clip_gradients(self.objective.parameters(), self.config.optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def gradients(self, images: Tensor, tokens: Tensor, masks: Sequence[Tensor], keep: Tensor | None) -> bool:
        """Gradients of a step, from nothing, and its loss; False if memory ran out and micro-batches can be smaller."""
        self.optimizer.zero_grad(set_to_none=True)
        device, dtype = self.setting.device, AUTOCAST.get(self.config.train.precision)
        parts = len(images) // self.micro
        losses = []
        try:
            for first in range(0, len(images), self.micro):
                part = slice(first, first + self.micro)
                sent = [mask[part].to(device, non_blocking=True) for mask in masks]
                kept = None if keep is None else keep[:, :, part]
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss = self.network(images[part], tokens[part], *sent, kept)
                self.scaler.scale(loss / parts).backward()
                losses.append(loss.detach())
        except torch.OutOfMemoryError:
            if not (self.config.train.auto_batch and halved(self.micro, len(images))):
                raise
            return False
        self.loss = torch.stack(losses).mean()
        return True


class MemoryCap:
    """As a context, lets a way take Setting.memory of the GPU, as if the other ways' weights were not there."""

    def __init__(self, setting: Setting, resident: Callable[[], list[Tensor]]) -> None:
        self.device, self.resident = setting.device, resident
        self.limit = parse_bytes(setting.memory) if setting.memory else 0

    def __enter__(self) -> None:
        if self.limit:
            own = sum(t.untyped_storage().nbytes() for t in self.resident())
            others = max(0, torch.cuda.memory_allocated(self.device) - own)
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (self.limit + others) / total), self.device)

    def __exit__(self, *_: object) -> None:
        return None


def resident(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights, gradients, buffers and the optimizer's moments: what a way holds between steps."""
    moments = [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)]
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return [*module.parameters(), *gradients, *module.buffers(), *moments]


def first_finite(once: Callable[[], tuple[float, float]], module: torch.nn.Module) -> StepResults:
    """Results of the first step whose gradients are finite: fp16's loss scale first has to find its place."""
    for _ in range(FINITE_WITHIN):
        loss, norm = once()
        if math.isfinite(norm):
            break
    gradients = {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}
    return StepResults(loss, norm, gradients)


def normalised(model: torch.nn.Module, images: Tensor) -> Tensor:
    """Images in [0, 1] with ImageNet's mean and deviation, as the official way takes them."""
    return (images - model.image_mean.view(3, 1, 1)) / model.image_std.view(3, 1, 1)


def settling(setting: Setting) -> int:
    """Untimed steps before a timed one: under a cap, the ways take each other's memory blocks away."""
    return 1 if setting.memory else 0


def flop_per_image(model: ModelConfig, cut: int) -> float:
    """FLOP of a step per image: matrix products, attention over visible pairs, the last block pruned, and the head.

    Additions and multiplications both count. What is computed again is not counted.
    """
    n, t, d = model.tokens, model.tokens - cut, model.width
    content, rows, hidden = n + t, n + 2 * t, int(model.width * model.mlp_ratio)
    full, last = (2 * r * d * (2 * d + 2 * hidden) + 2 * content * 2 * d * d for r in (rows, t))
    products = (model.depth - 1) * full + last + 2 * t * d * model.vocabulary
    attention = 4 * n * d * ((model.depth - 1) * rows + t)
    embedding = 2 * model.patches * 3 * model.patch_size**2 * d
    forward = {"products": products, "attention": attention, "embedding": embedding}
    return sum(flop * (1 + BACKWARD[part]) for part, flop in forward.items())
