"""What the profiling scripts run: one learner on one batch of random images, and names for the parts of its step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mapet.config import ModelConfig, OptimConfig, RunConfig, SpeedConfig, TrainConfig
from mapet.distributed import World
from mapet.model.vit import Block
from mapet.objectives import options
from mapet.objectives.two_stream import TwoStreamTask
from mapet.task import Batch
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


MODULES = {TwoStreamTask: "head and loss", Block: "residuals", nn.LayerNorm: "norms"}
"""Kind of module -> the part that it is, but for what has a part of its own inside."""


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

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def build(self) -> Step:
        """A learner as `mapet pretrain` makes it, and a batch of random images and tokens on its device."""
        config = RunConfig(
            model=replace(ModelConfig.preset(self.model), image_size=self.image_size),
            objective=options("mapet", cut=self.cut),
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
        return Step(learner, {"images": images.to(device), "tokens": tokens.to(device)})


@dataclass(frozen=True)
class Step:
    """A learner and its batch; all that the scripts know of the learner is in this file."""

    learner: Learner
    batch: Batch

    def __call__(self, number: int) -> None:
        """One optimizer step."""
        self.learner.step(number, self.batch, metrics=False)

    def held(self) -> list[Tensor]:
        """What there is between steps: weights, buffers, the optimizer's states and the batch; gradients go."""
        self.learner.optimizer.zero_grad(set_to_none=True)
        states = [leaf for leaf in tree_leaves(self.learner.optimizer.state_dict()) if isinstance(leaf, Tensor)]
        task = self.learner.task
        return [*task.parameters(), *task.buffers(), *states, *self.batch.values()]


class PartMode(TorchDispatchMode):
    """Sees every operator; `ranges[-1]` is the part that runs, where `named_parts` opens its ranges by `part_range`."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges = ["other"]

    @contextmanager
    def part_range(self, name: str) -> Iterator[None]:
        self.ranges.append(name)
        try:
            yield
        finally:
            self.ranges.pop()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def named_parts(step: Step, open_range: Callable[[str], Any] | None = None) -> Iterator[None]:
    """Inside, the parts of a step run in named ranges, for torch.profiler and, where nvtx is installed, for Nsight.

    Ranges are wrappers that come and go with this context: training code pays nothing for them.

    Args:
        open_range: name -> context manager that decorates too, as those of contextlib do, in place of those ranges.
    """
    open_range, learner = open_range or profiler_range, step.learner
    with ExitStack() as undo:
        task: TwoStreamTask = learner.task
        model = task.model
        methods = [
            (model, "embed", "embedding"),
            (task, "attention", "attention"),
            (task, "draw", "draw and jitter"),
            (task, "ready", "draw and jitter"),
            (task, "jittered", "draw and jitter"),
            (learner, "_update", "optimizer"),
        ]
        for module in task.modules():
            methods += [(module, "forward", name) for kind, name in MODULES.items() if isinstance(module, kind)]
        for block in model.blocks:
            methods += [(block, "_queries_and_keys", "attention projections"), (block, "_hidden", "mlp")]
            methods += [(block.attn, "output", "attention projections"), (block.mlp, "output", "mlp")]
        for owner, method, name in methods:
            setattr(owner, method, open_range(name)(getattr(owner, method)))
            undo.callback(delattr, owner, method)
        yield


@contextmanager
def profiler_range(name: str) -> Iterator[None]:
    """A range of torch.profiler and of nvtx."""
    with record_function(PREFIX + name), nvtx.annotate(name) if nvtx else ExitStack():
        yield
