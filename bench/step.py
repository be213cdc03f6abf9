"""One optimizer step of MaPeT as `mapet pretrain` takes it, beside the official way on the same weights and draws.

Ways: `ours`, `ours_compiled`, `official` (its masks built beforehand) and `official_with_masks` (masks built on the
step's own cores, where the official code builds them in data workers). All draw the same permutations and drop-path,
jitter the same images or none, clip, and update by the same fused AdamW. They are checked for one loss, one gradient
norm and equal clipped gradients in the first step.

All that bench knows of mapet's objectives and learner is in this file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import memory, options
from bench.contest import Arena, Contest, Entrant, Timed
from bench.official_way import OfficialWay, batch_masks
from bench.roofline import Cost
from mapet.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mapet.data.augment import JitterDraws, color_jitter
from mapet.distributed import World
from mapet.objectives import build_task
from mapet.objectives import options as method_options
from mapet.rng import StepRng, seed_global_generators
from mapet.task import Batch, Draws
from mapet.training.learner import Learner
from mapet.training.limits import halved
from mapet.training.optim import clip_gradients, make_optimizer
from mapet.training.precision import AUTOCAST
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
    backend: str = "auto"

    @cached_property
    def config(self) -> RunConfig:
        """The configuration of our way; every switch of section speed at its default."""
        return RunConfig(
            model=self.sizes.model,
            objective=method_options("mapet", cut=self.sizes.cut),
            data=DataConfig(color_jitter=self.jitter),
            optim=OptimConfig(global_batch=self.sizes.batch),
            train=TrainConfig(
                precision=self.sizes.dtype, device=str(self.device), backend=self.backend, gpu_memory=self.memory,
                auto_batch=bool(self.memory),
            ),
        )  # fmt: skip

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
        return {"images": images.to(self.device), "tokens": tokens.to(self.device)}

    def contest(self, suite: str, ways: tuple[str, ...], arena: Callable[[Setting], Any], **more: Any) -> Contest:
        """Ways of the step, the first of which is the base; more: what else the record says of the inputs.

        ValueError where the backend cannot run here.
        """
        size, dtype = self.sizes.model.head_size, self.sizes.dtype
        taken = choose_backend(self.backend, self.device, options.DTYPES[dtype], TWO_STREAM_BACKENDS, size)
        sizes = self.sizes.record() | {"jitter": self.jitter, "gpu_memory": self.memory, "backend": taken} | more
        backend = f" {self.backend} attention" if self.backend != "auto" else ""
        name = self.sizes.name + backend + (f" {self.memory} cap" if self.memory else "")
        return Contest(suite, name, sizes, ("step",), ways, ways[0], dtype, partial(arena, self))

    @property
    def autocast(self) -> torch.autocast:
        """The context of a forward pass in this dtype."""
        dtype = AUTOCAST.get(self.sizes.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    @property
    def cost(self) -> dict[str, Cost]:
        """FLOP of a step."""
        return {"step": Cost(self.sizes.batch * flop_per_image(self.sizes.model, self.sizes.cut), 0)}


class StepDraws:
    """Draws of steps as the learner draws them, for the official way and its data workers."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.task = build_task(config)  # on the CPU: workers must not touch a GPU

    def __call__(self, step: int, device: torch.device) -> Draws:
        """Of one step, on the device."""
        draws = self.task.draw(self.config.optim.global_batch, StepRng(self.config.train.seed, step, device))
        return {name: value.to(device) for name, value in draws.items()}


def colored(images: Tensor, draws: Draws) -> Tensor:
    """The images as floats, their colours changed where that was drawn."""
    if "factors" not in draws:
        return images / 255
    return color_jitter(images, JitterDraws(draws["factors"], draws["order"]))


def settings(chosen: options.Options, device: torch.device) -> list[Setting]:
    """One for each combination of sizes."""
    return [
        Setting(sizes, device, chosen.jitter, chosen.gpu_memory, chosen.backend)
        for sizes in options.combinations(chosen, device)
    ]


def contests(chosen: options.Options, device: torch.device) -> list[Contest]:
    """Ours against the official way, for each combination of sizes."""
    ways = ("ours", *(("ours_compiled",) if chosen.compile else ()), "official", "official_with_masks")
    return [setting.contest("step", ways, arena) for setting in settings(chosen, device)]


@contextmanager
def arena(setting: Setting) -> Iterator[Arena]:
    """The shared batch, and the builders of the ways."""
    compiled = replace(setting.config, speed=replace(setting.config.speed, compile=True))
    ways = {
        "ours": partial(ours, setting, setting.config),
        "ours_compiled": partial(ours, setting, compiled),
        "official": partial(official, setting, masks_built=False),
        "official_with_masks": partial(official, setting, masks_built=True),
    }
    yield Arena(ways, Judge(setting.sizes.dtype), setting.cost, setting.sizes.batch)
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


class OurStep:
    """A learner as `mapet pretrain` makes it."""

    def __init__(self, setting: Setting, config: RunConfig) -> None:
        self.learner = Learner(config, World(setting.device), setting.plan)
        self.task, self.optimizer = self.learner.task, self.learner.optimizer

    def step(self, number: int, batch: Batch) -> None:
        """One optimizer step, at the learner's own rate and draws."""
        self.learner.step(number, batch, metrics=False)

    def loss_and_norm(self) -> tuple[float, float]:
        """Of the last step."""
        numbers = self.learner.read()
        return numbers.loss, numbers.gradient_norm


def ours(setting: Setting, config: RunConfig) -> Entrant:
    """The learner's step."""
    way = OurStep(setting, config)
    steps = itertools.cycle(range(CYCLE))

    def step(number: int | None = None) -> None:
        with capped(setting, way):
            way.step(next(steps) if number is None else number, setting.batch)

    return Entrant(
        {"step": Timed(step, lambda: settled(setting, step))}, lambda: results(way, lambda: step(0)), step,
        lambda: resident(way.task, way.optimizer), lambda: {"micro_batch": way.learner.steps.micro},
    )  # fmt: skip


def official(setting: Setting, *, masks_built: bool) -> Entrant:
    """The official way; `masks_built`: within the timed step."""
    way = OfficialStep(setting)
    masks = {} if masks_built else {number: way.masks(number) for number in range(CYCLE)}
    steps = itertools.cycle(range(CYCLE))

    def step(number: int, made: Sequence[Tensor] | None) -> None:
        with capped(setting, way):
            way.step(number, way.masks(number) if made is None else made)

    def prepared() -> tuple[int, Sequence[Tensor] | None]:
        number = next(steps)
        made = None if masks_built else [mask.to(setting.device) for mask in masks[number]]
        settled(setting, lambda: step(number, made))
        return number, made

    return Entrant(
        {"step": Timed(step, prepared)}, lambda: results(way, lambda: step(0, masks.get(0))),
        lambda: step(*prepared()), lambda: resident(way.task, way.optimizer), lambda: {"micro_batch": way.micro},
    )  # fmt: skip


class OfficialStep:
    """The step around `OfficialWay`, with the learner's own draws, jitter, loss scale, clipping and optimizer."""

    def __init__(self, setting: Setting) -> None:
        config = setting.config
        self.setting, self.config, self.micro = setting, config, setting.sizes.batch
        self.draws = StepDraws(config)
        seed_global_generators(config.train.seed)
        self.task = build_task(config).to(setting.device)
        self.network = OfficialWay(self.task.model)
        self.optimizer = make_optimizer(self.task.parameter_groups(config.optim), config.optim)
        self.scaler = torch.amp.GradScaler(setting.device.type, enabled=config.train.precision == "fp16")
        self.loss = self.norm = torch.zeros(())
        for group in self.optimizer.param_groups:
            group["lr"] = config.optim.warmup_lr

    def loss_and_norm(self) -> tuple[float, float]:
        """Of the last step."""
        return self.loss.item(), self.norm.item()

    def masks(self, step: int) -> tuple[Tensor, ...]:
        """What the official data workers send for a step, on the CPU."""
        permutation = self.draws(step, self.setting.device)["permutation"].cpu()
        return batch_masks(permutation, self.config.objective.cut, self.config.model.heads)

    def step(self, step: int, masks: Sequence[Tensor]) -> None:
        """One optimizer step on the shared batch."""
        draws, model = self.draws(step, self.setting.device), self.task.model
        images = colored(self.setting.batch["images"], draws)
        images = (images - model.image_mean.view(3, 1, 1)) / model.image_std.view(3, 1, 1)
        self.update(images, self.setting.batch["tokens"], masks, draws.get("keep"))

    def update(self, images: Tensor, tokens: Tensor, masks: Sequence[Tensor], keep: Tensor | None) -> None:
        """Gradients, clipping and update from what data workers send: normalised images, tokens and masks.

        Where the memory ends, with smaller micro-batches from then on.
        """
        while not self.gradients(images, tokens, masks, keep):
            self.micro = halved(self.micro, len(images))
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        self.scaler.unscale_(self.optimizer)
        self.norm = clip_gradients(self.task.parameters(), self.config.optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def gradients(self, images: Tensor, tokens: Tensor, masks: Sequence[Tensor], keep: Tensor | None) -> bool:
        """Gradients of a step, from nothing, and its loss; False if memory ran out and micro-batches can be smaller."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        try:
            for first in range(0, len(images), self.micro):
                part = slice(first, first + self.micro)
                sent = [mask[part].to(self.setting.device, non_blocking=True) for mask in masks]
                with self.setting.autocast:
                    factors = None if keep is None else keep[part].permute(1, 2, 0)
                    loss = self.network(images[part], tokens[part], *sent, factors)
                self.scaler.scale(loss * self.micro / len(images)).backward()
                losses.append(loss.detach())
        except torch.OutOfMemoryError:
            if not (self.config.train.auto_batch and halved(self.micro, len(images))):
                raise
            return False
        self.loss = torch.stack(losses).mean()
        return True


@contextmanager
def capped(setting: Setting, way: OurStep | OfficialStep) -> Iterator[None]:
    """Inside, a way may take Setting.memory of the GPU, as if the other ways' weights were not there."""
    if setting.memory:
        own = memory.storage_bytes(resident(way.task, way.optimizer))
        others = max(0, torch.cuda.memory_allocated(setting.device) - own)
        total = torch.cuda.get_device_properties(setting.device).total_memory
        share = min(1.0, (parse_bytes(setting.memory) + others) / total)
        torch.cuda.set_per_process_memory_fraction(share, setting.device)
    yield


def settled(setting: Setting, step: Callable[[], object]) -> tuple[()]:
    """Under a cap the ways take each other's memory blocks away: an untimed step brings a way's own back."""
    if setting.memory:
        step()
    return ()


def resident(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights, gradients, buffers and the optimizer's moments: what a way holds between steps."""
    moments = [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)]
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return [*module.parameters(), *gradients, *module.buffers(), *moments]


def results(way: OurStep | OfficialStep, once: Callable[[], object]) -> StepResults:
    """Of the first step, which `once` takes, whose gradients are finite: fp16's loss scale has to find its place."""
    for _ in range(FINITE_WITHIN):
        once()
        loss, norm = way.loss_and_norm()
        if math.isfinite(norm):
            break
    gradients = {n: p.grad.detach().clone() for n, p in way.task.named_parameters() if p.grad is not None}
    return StepResults(loss, norm, gradients)


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
