"""The optimizer step on a GPU: its switches agree, a recorded pass repeats, and the host never waits for the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")  # the learner brings the checkpoints with it

from test_learner import batches
from tiny_run import make_cache, make_config

from mapet.config import ModelConfig, SpeedConfig
from mapet.data.cache import TokenCache
from mapet.distributed import World
from mapet.training.learner import Learner
from mapet.training.schedule import plan_steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODEL = ModelConfig(image_size=16, patch_size=4, width=64, depth=3, heads=2, vocabulary=32, drop_path=0.3)
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}
STEPS = 6
SWITCHES = [field.name for field in dataclasses.fields(SpeedConfig) if field.name != "fp8"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    return TokenCache.open(make_cache(tmp_path_factory.mktemp("data") / "cache"))


def learner_for(cache: TokenCache, precision: str, accumulation: int = 1, **speed: bool) -> Learner:
    """A learner with jitter, drop-path and the loss scale at a value without overflow."""
    changes = {"train.precision": precision, "train.device": "cuda", "data.color_jitter": 0.4}
    changes["train.micro_batch"] = 8 // accumulation
    config = make_config(cache.path, Path("unused"), **changes)
    config = dataclasses.replace(config, model=MODEL, speed=SpeedConfig(**speed))
    made = Learner(config, World(torch.device("cuda")), plan_steps(config, len(cache), 1))
    if made.scaler.is_enabled():
        made.scaler.load_state_dict(made.scaler.state_dict() | {"scale": 256.0})
    return made


def numbers(learner: Learner, cache: TokenCache) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    found = []
    for step, batch in zip(range(STEPS), batches(cache, learner.config), strict=False):
        learner.step(step, batch, metrics=False)
        read = learner.read()
        found.append((read.loss, read.gradient_norm))
    assert all(math.isfinite(x) for pair in found for x in pair)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_no_step_beyond_rounding(cache: TokenCache, switch: str, precision: str) -> None:
    turned = not getattr(SpeedConfig(), switch)
    same = numbers(learner_for(cache, precision), cache)
    changed = numbers(learner_for(cache, precision, **{switch: turned}), cache)
    torch.testing.assert_close(torch.tensor(changed), torch.tensor(same), rtol=TOLERANCE[precision], atol=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_recorded_pass_repeats_the_steps(cache: TokenCache, precision: str, accumulation: int) -> None:
    """With accumulation the recording is replayed within a step, on top of gradients that are there."""
    same = numbers(learner_for(cache, precision, accumulation, skip_dropped=False), cache)
    recorded = learner_for(cache, precision, accumulation, cuda_graphs=True)
    torch.testing.assert_close(torch.tensor(numbers(recorded, cache)), torch.tensor(same), rtol=1e-2, atol=1e-4)
    assert recorded.graph is not None


def test_fp8_takes_the_same_steps_within_its_rounding(cache: TokenCache) -> None:
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    same, changed = (numbers(learner_for(cache, "bf16", fp8=on), cache) for on in (False, True))
    torch.testing.assert_close(torch.tensor(changed), torch.tensor(same), rtol=0.1, atol=1e-3)
    assert changed != same


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("speed", [{}, {"cuda_graphs": True}, {"skip_dropped": False}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_host_never_waits_within_a_step(cache: TokenCache, precision: str, speed: dict[str, bool]) -> None:
    learner = learner_for(cache, precision, **speed)
    feed = iter(batches(cache, learner.config))
    for step in range(STEPS):
        batch = {name: value.pin_memory() for name, value in next(feed).items()}
        if step < 2:  # kernels are compiled, workspaces taken, a pass recorded
            learner.step(step, batch, metrics=False)
            continue
        with waiting_is_an_error():
            learner.step(step, batch, metrics=False)
    assert math.isfinite(learner.read().loss)
