"""The memory plan against a GPU: predicted peaks, and ViT-B under a cap of 16 GiB. `make test-gpu` runs these."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator

import pytest
import torch

from mapet.config import DataConfig, ModelConfig, OptimConfig, RunConfig, SpeedConfig, TrainConfig
from mapet.distributed import World
from mapet.objectives import options
from mapet.planning.memory import StepSize, predict_memory, step_size
from mapet.training.learner import Learner
from mapet.training.limits import cap_memory
from mapet.training.schedule import plan_steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def empty_gpu() -> Iterator[None]:
    """Nothing cached, and no cap, before and after."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    gc.collect()
    torch.cuda.empty_cache()


def peak_of_two_steps(size: StepSize) -> int:
    """torch.cuda.max_memory_allocated over the second of two optimizer steps, less what others held before."""
    before = torch.cuda.memory_allocated(GPU)
    learner = Learner(size.config, World(GPU), plan_steps(size.config, size.share, 1))
    batch = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in learner.task.example(size.share).items()}
    for step in range(2):
        torch.cuda.reset_peak_memory_stats(GPU)
        learner.step(step, batch, metrics=False)
    assert math.isfinite(learner.read().loss)
    return torch.cuda.max_memory_allocated(GPU) - before


def size_of(model: str, images: int, recompute: str, precision: str = "bf16") -> StepSize:
    config = RunConfig(
        model=ModelConfig.preset(model),
        objective=options("mapet", cut=60),
        data=DataConfig(color_jitter=0.0),
        optim=OptimConfig(global_batch=images),
        train=TrainConfig(precision=precision, recompute=recompute),
        speed=SpeedConfig(skip_dropped=False),
    )
    return step_size(config, 1)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recompute", ["none", "cheap", "blocks"])
@pytest.mark.parametrize(("model", "images"), [("tiny", 128), ("small", 96), ("base", 64)])
def test_the_measured_peak_is_within_a_tenth_of_the_predicted_one(model, images, recompute, precision) -> None:
    size = size_of(model, images, recompute, precision)
    predicted = predict_memory(size).total
    if predicted > 0.9 * torch.cuda.get_device_properties(GPU).total_memory:
        pytest.skip(f"takes {predicted / 2**30:.0f} GiB")
    assert peak_of_two_steps(size) == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize(("images", "recompute"), [(96, "none"), (128, "cheap"), (512, "blocks")])
def test_vit_base_under_a_cap_of_16_gib(images: int, recompute: str) -> None:
    if torch.cuda.get_device_properties(GPU).total_memory < 16 * 2**30:
        pytest.skip("the GPU has less than 16 GiB")
    cap_memory("16GiB", GPU)
    assert peak_of_two_steps(size_of("base", images, recompute)) <= 16 * 2**30


def test_the_cap_holds() -> None:
    if torch.cuda.get_device_properties(GPU).total_memory < 2 * 2**30:
        pytest.skip("the GPU has less than 2 GiB")
    cap_memory("1GiB", GPU)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 * 2**30, dtype=torch.uint8, device=GPU)
