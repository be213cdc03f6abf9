"""The memory plan against a GPU: predicted peaks, and ViT-B under a cap of 16 GiB. `make test-gpu` runs these."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from mapet.config import ModelConfig, ObjectiveConfig, OptimConfig
from mapet.objectives import build_objective
from mapet.planning.memory import StepSize, predict_memory
from mapet.training.limits import cap_memory
from mapet.training.optim import clip_gradients, gated_step, make_optimizer

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
    model, count = size.model, size.micro_batch
    network = build_objective(size.objective, model, recompute=size.recompute).to(GPU)
    optimizer = make_optimizer(network, OptimConfig())
    generator = torch.Generator(GPU).manual_seed(0)
    images = torch.randint(
        0, 256, (count, 3, model.image_size, model.image_size), generator=generator, device=GPU, dtype=torch.uint8
    )
    tokens = torch.randint(0, model.vocabulary, (count, model.patches), generator=generator, device=GPU)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(size.precision)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats(GPU)
        plan = network.sample_plan(count, generator, GPU)
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            loss, _ = network(images, tokens, plan.permutation, plan.keep, False)
        loss.backward()
        clip_gradients(network.parameters(), 3.0)
        gated_step(optimizer, torch.zeros((), device=GPU))
    assert torch.isfinite(loss)
    return torch.cuda.max_memory_allocated(GPU) - before


def size_of(model: str, images: int, recompute: str, precision: str = "bf16") -> StepSize:
    return StepSize(ModelConfig.preset(model), ObjectiveConfig(cut=60), images, images, precision, recompute)


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
