"""Small tasks of the two-stream family, and batches for them."""

from __future__ import annotations

from typing import Any

import torch

from mapet.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, SpeedConfig, TrainConfig
from mapet.objectives import build_task, options
from mapet.objectives.two_stream import TwoStreamTask
from mapet.rng import StepRng
from mapet.task import Batch

TINY = ModelConfig(image_size=24, patch_size=8, width=32, depth=3, heads=2, vocabulary=40)


def options_for(name: str, cut: int, model: ModelConfig = TINY) -> ObjectiveConfig:
    """Options of a method that predicts all but `cut` tokens."""
    return options(name, masked=model.tokens - cut) if name == "mim" else options(name, cut=cut)


def make_task(
    name: str,
    cut: int = 4,
    model: ModelConfig = TINY,
    *,
    seed: int = 0,
    backend: str = "auto",
    recompute: str = "none",
    color_jitter: float = 0.0,
    **speed: bool,
) -> TwoStreamTask:
    """A task with weights drawn from `seed`, in training mode."""
    torch.manual_seed(seed)
    config = RunConfig(
        model=model,
        objective=options_for(name, cut, model),
        data=DataConfig(color_jitter=color_jitter),
        train=TrainConfig(backend=backend, recompute=recompute),
        speed=SpeedConfig(**speed),
    )
    return build_task(config)


def random_batch(model: ModelConfig = TINY, images: int = 4, seed: int = 0) -> Batch:
    """uint8 pictures and tokens."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(
        0, 256, (images, 3, model.image_size, model.image_size), generator=generator, dtype=torch.uint8
    )
    return {
        "images": pixels,
        "tokens": torch.randint(0, model.vocabulary, (images, model.patches), generator=generator),
    }


def draws_for(task: TwoStreamTask, images: int = 4, **changes: Any) -> dict[str, Any]:
    """What step 0 of seed 0 draws, with some of it changed."""
    return task.draw(images, StepRng(0, 0)) | changes
