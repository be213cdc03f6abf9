"""The switches of config.speed: each gives the same loss and gradients on and off, and does what it says."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from tasks import draws_for, make_task, random_batch
from test_learner import batches, make_learner, run
from tiny_run import make_cache, make_config
from torch import Tensor

from mapet.config import ModelConfig, RunConfig, SpeedConfig, to_dict
from mapet.data.cache import TokenCache
from mapet.distributed import World
from mapet.errors import ConfigError
from mapet.model.stochastic_depth import Kept, add, kept_images, take
from mapet.objectives import OBJECTIVES
from mapet.training.checkpoint import config_differences
from mapet.training.graphs import GraphedPass
from mapet.training.learner import check_speed

SIZES = ModelConfig(image_size=24, patch_size=8, width=32, depth=3, heads=2, vocabulary=40, drop_path=0.4)
IMAGES = 6


@pytest.fixture
def cache(tmp_path):
    return TokenCache.open(make_cache(tmp_path / "cache"))


def loss_and_gradients(name: str, *, skip: bool, keep: Tensor | None = None, recompute: str = "none") -> list[Tensor]:
    task = make_task(name, model=SIZES, recompute=recompute).double()
    draws = draws_for(task, IMAGES)
    if keep is not None:
        draws["keep"] = keep
    loss = task(random_batch(SIZES, IMAGES), task.ready(draws, torch.device("cpu")) if skip else draws)["loss"]
    loss.backward()
    assert all(p.grad is not None for p in task.parameters())
    return [loss.detach(), *(p.grad for p in task.parameters())]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("recompute", ["none", "cheap", "blocks"])
def test_left_out_work_changes_neither_loss_nor_gradients(name: str, recompute: str) -> None:
    torch.testing.assert_close(
        loss_and_gradients(name, skip=True, recompute=recompute), loss_and_gradients(name, skip=False)
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_branch_that_drops_every_image_adds_nothing_and_has_gradients(name: str) -> None:
    keep = torch.ones(IMAGES, 3, 2)
    keep[:, 1, 0] = keep[:, 2] = 0
    torch.testing.assert_close(
        loss_and_gradients(name, skip=True, keep=keep), loss_and_gradients(name, skip=False, keep=keep)
    )


def test_the_mlp_sees_the_rows_of_kept_images_only() -> None:
    task, rows = make_task("mapet", model=SIZES), []
    for block in task.model.blocks:
        block.mlp.fc1.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    keep = torch.tensor([1.0, 0.0, 1.5, 0.0, 1.5, 1.5]).view(IMAGES, 1, 1).expand(IMAGES, 3, 2)
    task(random_batch(SIZES, IMAGES), task.ready(draws_for(task, IMAGES, keep=keep), torch.device("cpu")))
    whole, last = (sum(task.layout(1).groups(predicted)) for predicted in (False, True))
    assert rows == [4 * whole, 4 * whole, 4 * last]


def test_kept_images_are_those_of_the_draws() -> None:
    """Whatever was drawn, image by image: so skipping has the distribution that multiplying has."""
    keep = draws_for(make_task("mapet", model=SIZES), 200)["keep"]
    kept = kept_images(keep, "cpu")
    assert kept[0] == (None, None)
    for block, rate in ((1, 0.2), (2, 0.4)):
        for branch in (0, 1):
            images, factor = kept[block][branch]
            assert images.tolist() == [i for i in range(200) if keep[i, block, branch] > 0]
            assert factor == pytest.approx(1 / (1 - rate))
            assert len(images) == pytest.approx(200 * (1 - rate), abs=4 * (200 * rate * (1 - rate)) ** 0.5)


def test_take_and_add_have_exact_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(n, 3, generator=generator, dtype=torch.float64, requires_grad=True) for n in (20, 10))
    kept, groups = Kept(torch.tensor([1, 3]), 1.25), (3, 2)
    assert torch.autograd.gradcheck(lambda x: take(x, kept.images, groups), x)
    assert torch.autograd.gradcheck(lambda x, branch: add(x, branch, kept, groups), (x, branch))
    rows = [*range(3, 6), *range(9, 12), *range(14, 16), *range(18, 20)]
    assert torch.equal(take(x, kept.images, groups), x[rows])
    added = x.detach().clone()
    added[rows] += 1.25 * branch
    torch.testing.assert_close(add(x, branch, kept, groups), added)


def test_steps_are_the_same_with_dropped_work_multiplied_away(cache) -> None:
    changes = {"train.micro_batch": 4, "train.ema_decay": 0.9}
    base, other = make_learner(cache, **changes), make_learner(cache, **changes, **{"speed.skip_dropped": False})
    run(base, cache, 0, 4)
    run(other, cache, 0, 4)
    torch.testing.assert_close(other.task.state_dict(), base.task.state_dict())
    torch.testing.assert_close(other.average.weights, base.average.weights)
    assert other.read().loss == pytest.approx(base.read().loss, rel=1e-6)


def test_dropped_work_is_multiplied_away_where_shapes_must_stay() -> None:
    assert make_task("mapet").skips_dropped
    for speed in ({"compile": True}, {"cuda_graphs": True}, {"skip_dropped": False}):
        task = make_task("mapet", **speed)
        assert not task.skips_dropped
        draws = draws_for(task)
        assert task.ready(draws, torch.device("cpu"))["keep"] is draws["keep"]


def test_a_recorded_pass_repeats_itself_on_new_inputs() -> None:
    """With a stand-in for the recording: what it repeats runs on the inputs' copies, and adds to the gradients."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def run(x: Tensor) -> Tensor:
        loss = (weight * x).sum()
        loss.backward()
        return loss.detach()

    def record(call):
        result = call().clone()
        return lambda: result.copy_(call()), result

    first = torch.tensor([3.0, 4.0])
    weight.grad = torch.tensor([10.0, 10.0])
    recorded = GraphedPass(run, [first], [weight], record)
    assert weight.grad.tolist() == [10.0, 10.0]
    assert recorded(torch.tensor([5.0, 6.0])).item() == 17 and weight.grad.tolist() == [15.0, 16.0]
    assert recorded(torch.tensor([1.0, 0.0])).item() == 1 and weight.grad.tolist() == [16.0, 16.0]
    assert first.tolist() == [3.0, 4.0]


def test_a_learner_steps_by_recordings(cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches, jitter, drop-path and the average included, as an eager run; passes with metrics are eager."""
    made = []

    def record(call):
        result = call().clone()
        made.append(call)
        return lambda: result.copy_(call()), result

    monkeypatch.setattr("mapet.training.learner.check_speed", lambda *_: None)
    monkeypatch.setattr("mapet.training.learner.GraphedPass", lambda *arguments: GraphedPass(*arguments, record))
    changes = {"train.micro_batch": 4, "train.ema_decay": 0.9}
    graphed, eager = (make_learner(cache, **changes, **{"speed.cuda_graphs": on}) for on in (True, False))
    for learner in (graphed, eager):
        for step, batch in enumerate(batches(cache, learner.config, 4)):
            learner.step(step, batch, metrics=step == 2)
    assert len(made) == 1
    torch.testing.assert_close(graphed.task.state_dict(), eager.task.state_dict())
    assert graphed.read().loss == pytest.approx(eager.read().loss, rel=1e-6)


def test_graphs_need_a_gpu_and_one_process(cache, tmp_path) -> None:
    config = make_config(cache.path, tmp_path / "run", **{"speed.cuda_graphs": True})
    with pytest.raises(ConfigError, match=r"speed\.cuda_graphs needs a GPU and one process, this run has cpu"):
        check_speed(config, World(torch.device("cpu")))
    with pytest.raises(ConfigError, match="this run has 2 processes"):
        check_speed(config, World(torch.device("cuda"), size=2))


def test_fp8_is_refused_without_its_package(cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"speed\.fp8 needs the package torchao .* pip install torchao"):
        make_learner(cache, **{"speed.fp8": True})


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the package torchao")
def test_fp8_trains_nearly_as_fp32(cache) -> None:
    losses = {}
    for fp8 in (False, True):
        learner = make_learner(cache, **{"speed.fp8": fp8})
        run(learner, cache, 0, 4)
        losses[fp8] = learner.read().loss
    assert losses[True] != losses[False] and losses[True] == pytest.approx(losses[False], rel=2e-3)


def test_a_resumed_run_may_switch_all_but_fp8() -> None:
    saved = to_dict(RunConfig())
    switched = to_dict(replace(RunConfig(), speed=SpeedConfig(compile=True, skip_dropped=False, cuda_graphs=True)))
    assert config_differences(saved, switched) == []
    assert config_differences(saved, to_dict(replace(RunConfig(), speed=SpeedConfig(fp8=True)))) == [
        "speed.fp8 was False, is True"
    ]
