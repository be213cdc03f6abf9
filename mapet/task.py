"""What a method is to everything around it: loop, learner, planner, checkpoint, parallel and export know a Task only.

A method is one file with its options (an ObjectiveConfig) and its Task, and one line in mapet/objectives/__init__.py.
Every tensor of a batch and of a step's draws has the images in its first dimension, so that anyone can slice them for
processes and micro-batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mapet.config import ModelConfig, ObjectiveConfig, OptimConfig, RunConfig
from mapet.rng import StepRng

if TYPE_CHECKING:
    from mapet.data.loader import Share

Batch = dict[str, Tensor]
"""What a step learns from, by name; images first."""
Draws = dict[str, Tensor]
"""Everything random of a step, by name; images first."""

NEVER_DECAYED = ("pos_embed", "cls_token")


class Data(Protocol):
    """What a run learns from. Pickled for data workers where these are spawned."""

    @property
    def image_bytes(self) -> int:
        """Of one image in a batch, about."""

    def __len__(self) -> int:
        """Images."""

    def fingerprint(self) -> str:
        """A hash of all that the run learns from it; a checkpoint goes with one."""

    def check_model(self, model: ModelConfig) -> None:
        """DataError unless the images fit the model."""

    def batch(self, ids: Tensor, share: Share, beat: Callable[[], None]) -> Batch:
        """These images (int64 (b,)), as step, seed and part of `share` say. `beat` is called now and then."""


class Task(nn.Module, ABC):
    """A network and what it is trained to do. The state dict is all that a checkpoint keeps of it, strictly.

    Args:
        config: of the run; its objective is one of `Options`.
    """

    Options: ClassVar[type[ObjectiveConfig]]

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config.model
        self.options: Any = config.objective

    @classmethod
    @abstractmethod
    def open(cls, config: RunConfig) -> Data:
        """The data that the configuration names. DataError where it is missing, damaged or not for this model."""

    @abstractmethod
    def draw(self, images: int, rng: StepRng) -> Draws:
        """Everything random of a step on so many images, the whole global batch; in eval mode, of an evaluation.

        Draws lie on rng.device, or on the host where that has to know them.
        """

    def ready(self, draws: Draws, device: torch.device) -> dict[str, Any]:
        """The draws of a micro-batch as `forward` takes them: here, on the device. Not part of a compiled program."""
        return {name: value.to(device, non_blocking=True) for name, value in draws.items()}

    @abstractmethod
    def forward(self, batch: Batch, draws: dict[str, Any], *, metrics: bool = True) -> dict[str, Tensor]:
        """Means over a micro-batch: "loss", which alone has a gradient, and what else is logged (scalars).

        Without `metrics` only the loss is wanted.
        """

    @abstractmethod
    def example(self, images: int) -> Batch:
        """A batch of the shapes and dtypes that `open` gives, without values: what the planner traces."""

    @abstractmethod
    def units(self) -> list[nn.Module]:
        """The modules that make up most of the network, in order: sharded, and compiled, one by one."""

    def parameter_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """AdamW's groups: weights with decay, then vectors (norms, layer scale), biases, positions, class token."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        decayed = [p for name, p in trained if is_decayed(name, p)]
        others = [p for name, p in trained if not is_decayed(name, p)]
        return [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]

    @abstractmethod
    def backbone(self) -> tuple[ModelConfig, dict[str, Tensor]]:
        """What is left after training: a vision transformer's configuration and its weights, under official names."""

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """ConfigError for what cannot work on this device in this dtype; asked before anything is written."""

    def after_update(self, step: int, skip: Tensor) -> None:
        """Called after the optimizer's update number `step` (0 is the first): teachers, codebooks by moving averages.

        skip: scalar float32 on the device; where it is 1 the update was called off, and nothing may change here.
        """


def is_decayed(name: str, parameter: Tensor) -> bool:
    """No decay on vectors (norms, layer scale), biases, position and class token; a mask token is decayed."""
    own_name = name.rpartition(".")[2]
    return parameter.ndim > 1 and own_name != "bias" and own_name not in NEVER_DECAYED
