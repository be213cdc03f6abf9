"""What the profiling scripts run: one learner on one batch of random images, and names for the parts of its step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.profiler import record_function

from mapet.config import ModelConfig, ObjectiveConfig, OptimConfig, RunConfig, SpeedConfig, TrainConfig
from mapet.data.loader import Batch
from mapet.distributed import World
from mapet.model.vit import Block, MaskedTokenViT
from mapet.objectives import Objective
from mapet.training.learner import Learner
from mapet.training.schedule import StepPlan

try:
    import nvtx
except ImportError:
    nvtx = None

PREFIX = "part: "
"""What the names of ranges begin with in traces."""

PARTS = (
    "draw and jitter", "embedding", "norms", "attention projections", "attention", "mlp", "residuals", "head and loss",
    "optimizer", "other",
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """The step to look at."""

    model: Literal["tiny", "small", "base"] = "tiny"
    batch: int = 8
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    cut: int = 50
    image_size: int = 224
    device: str = "cpu"
    backend: str = "auto"
    speed: SpeedConfig = field(default_factory=SpeedConfig)

    def build(self) -> tuple[Learner, Batch]:
        """A learner as `mapet pretrain` makes it, and a batch of random images and tokens on its device."""
        config = RunConfig(
            model=replace(ModelConfig.preset(self.model), image_size=self.image_size),
            objective=ObjectiveConfig(cut=self.cut),
            optim=OptimConfig(global_batch=self.batch),
            train=TrainConfig(precision=self.precision, device=self.device, backend=self.backend),
            speed=self.speed,
        )
        device = torch.device(self.device)
        learner = Learner(
            config, World(device), StepPlan(per_epoch=1000, last=1000, share=self.batch, micro=self.batch)
        )
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, 3, self.image_size, self.image_size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        tokens = torch.randint(0, config.model.vocabulary, (self.batch, config.model.patches), generator=generator)
        return learner, Batch(images, tokens, torch.arange(self.batch)).to(device)


@contextmanager
def named_parts(learner: Learner, open_range: Callable[[str], Any] | None = None) -> Iterator[None]:
    """Inside, the parts of a step run in named ranges, for torch.profiler and, where nvtx is installed, for Nsight.

    Ranges are hooks and wrappers that come and go with this context: training code pays nothing for them.

    Args:
        open_range: name -> context manager, in place of those ranges.
    """
    open_range = open_range or profiler_range
    with ExitStack() as undo:
        for module in learner.objective.modules():
            if (name := _part_of(module)) is not None:
                _hook(module, name, open_range, undo)
        model: MaskedTokenViT = learner.model
        methods = [
            (model, "embed", "embedding"),
            (learner.objective, "attention", "attention"),
            (learner, "_draw", "draw and jitter"),
            (learner, "_forward", "draw and jitter"),  # what is in it and in no part of the model is the jitter
            (learner, "_update", "optimizer"),
        ]
        for block in model.blocks:
            methods += [(block, "_queries_and_keys", "attention projections"), (block, "_hidden", "mlp")]
            methods += [(block.attn, "output", "attention projections"), (block.mlp, "output", "mlp")]
        for owner, method, name in methods:
            setattr(owner, method, _in_range(getattr(owner, method), name, open_range))
            undo.callback(delattr, owner, method)
        yield


@contextmanager
def profiler_range(name: str) -> Iterator[None]:
    """A range of torch.profiler and of nvtx."""
    with record_function(PREFIX + name), nvtx.annotate(name) if nvtx else ExitStack():
        yield


def _part_of(module: nn.Module) -> str | None:
    kinds = (
        (Objective, "head and loss"),
        (Block, "residuals"),
        (nn.LayerNorm, "norms"),
    )
    return next((name for kind, name in kinds if isinstance(module, kind)), None)


def _hook(module: nn.Module, name: str, open_range: Callable[[str], Any], undo: ExitStack) -> None:
    entered: list[ExitStack] = []

    def enter(*_) -> None:
        entered.append(ExitStack())
        entered[-1].enter_context(open_range(name))

    def leave(*_) -> None:
        entered.pop().close()

    undo.callback(module.register_forward_pre_hook(enter).remove)
    undo.callback(module.register_forward_hook(leave, always_call=True).remove)


def _in_range(method: Callable, name: str, open_range: Callable[[str], Any]) -> Callable:
    @functools.wraps(method)
    def wrapped(*arguments, **options):
        with open_range(name):
            return method(*arguments, **options)

    return wrapped
