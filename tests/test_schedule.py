"""The learning rate against the official formulas and against timm, and how a run divides into steps."""

import math
from pathlib import Path

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from tiny_run import make_config

from mapet.config import OptimConfig
from mapet.errors import ConfigError
from mapet.training.schedule import learning_rate, plan_steps


def official(e: float, base: float = 1.5e-3, low: float = 1e-5, warm: float = 1e-6, W: int = 10, E: int = 300) -> float:
    return warm + e * (base - warm) / W if e < W else low + 0.5 * (base - low) * (1 + math.cos(math.pi * e / E))


@pytest.mark.parametrize("epoch", [0, 1, 5, 9, 10, 11, 150, 299])
def test_per_epoch_is_the_official_formula_all_epoch_long(epoch):
    optim = OptimConfig(schedule_per="epoch")
    rates = {learning_rate(optim, 625, epoch * 625 + i) for i in (0, 1, 624)}
    assert len(rates) == 1
    assert rates.pop() == pytest.approx(official(epoch), rel=1e-12)


@pytest.mark.parametrize("step", [0, 1, 6249, 6250, 6251, 100_000, 187_499])
def test_per_step_is_the_official_formula_at_fractions_of_an_epoch(step):
    assert learning_rate(OptimConfig(), 625, step) == pytest.approx(official(step / 625), rel=1e-12)


def test_per_epoch_equals_timms_scheduler_with_cooldown():
    optim = OptimConfig(schedule_per="epoch", epochs=30, warmup_epochs=4, cooldown_epochs=5)
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    scheduler = CosineLRScheduler(
        sgd, t_initial=30, lr_min=optim.min_lr, warmup_t=4, warmup_lr_init=optim.warmup_lr, warmup_prefix=False
    )
    for epoch in range(35):
        scheduler.step(epoch)
        assert learning_rate(optim, 7, epoch * 7 + 3) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-12)


def test_the_largest_rate_is_a_little_below_the_base():
    rates = [learning_rate(OptimConfig(schedule_per="epoch"), 1, epoch) for epoch in range(310)]
    assert max(rates) / 1.5e-3 == pytest.approx(0.997, abs=5e-4)
    assert rates[300:] == [1e-5] * 10


def test_no_warmup_starts_at_the_base():
    assert learning_rate(OptimConfig(warmup_epochs=0), 10, 0) == 1.5e-3


def test_steps_of_the_papers_run():
    config = make_config(Path("c"), Path("o"), **{"optim.epochs": 300, "optim.global_batch": 2048})
    steps = plan_steps(config, 1_281_167, 32)
    assert (steps.per_epoch, steps.last, steps.share, steps.accumulation) == (625, 187_500, 64, 1)


def test_max_steps_cooldown_and_micro_batches():
    changes = {"optim.cooldown_epochs": 2, "train.max_steps": 13, "train.micro_batch": 2}
    steps = plan_steps(make_config(Path("c"), Path("o"), **changes), 47, 2)
    assert (steps.per_epoch, steps.last, steps.share, steps.micro, steps.accumulation) == (5, 13, 4, 2, 2)
    everything = plan_steps(make_config(Path("c"), Path("o"), **{**changes, "train.max_steps": 0}), 47, 2)
    assert everything.last == 30


@pytest.mark.parametrize(
    ("changes", "images", "processes", "message"),
    [
        ({}, 7, 1, "global_batch 8 is larger than the data, 7 images"),
        ({}, 40, 3, "global_batch 8 is not divisible by the number of processes, 3"),
        ({"train.micro_batch": 3}, 40, 2, "micro_batch 3 does not divide 4"),
    ],
)
def test_batches_that_do_not_divide_are_refused(changes, images, processes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan_steps(make_config(Path("c"), Path("o"), **changes), images, processes)
    assert caught.value.exit_code == 2
