"""One optimizer step: overflow, failures, clipping, accumulation, precisions. Assertions 8, 9 and 18."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import OBJECTIVE, make_cache, make_config
from torch import nn

from mapet.config import RunConfig
from mapet.data.cache import TokenCache
from mapet.data.loader import make_loader
from mapet.distributed import World
from mapet.errors import ConfigError
from mapet.objectives import two_stream
from mapet.rng import StepRng
from mapet.task import Batch
from mapet.training.learner import Learner
from mapet.training.schedule import plan_steps
from mapet_kernels.selfcheck import Agreement

CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> TokenCache:
    return TokenCache.open(make_cache(tmp_path_factory.mktemp("data") / "cache"))


def make_learner(cache: TokenCache, **changes) -> Learner:
    config = make_config(cache.path, Path("unused"), **changes)
    return Learner(config, CPU, plan_steps(config, len(cache), 1))


def batches(cache: TokenCache, config: RunConfig, steps: int = 20) -> Iterator[Batch]:
    return iter(
        make_loader(
            cache,
            seed=config.train.seed,
            global_batch=config.optim.global_batch,
            start_step=0,
            stop_step=steps,
            workers=config.data.workers,
        )
    )


def run(learner: Learner, cache: TokenCache, first: int, last: int) -> None:
    """Steps first to last - 1."""
    for step, batch in enumerate(batches(cache, learner.config)):
        if first <= step < last:
            learner.step(step, batch, metrics=True)


def snapshot(learner: Learner) -> dict[str, torch.Tensor]:
    state = learner.state()
    moments = {f"{i}.{k}": v for i, s in state.trainer["optimizer"]["state"].items() for k, v in s.items()}
    averages = {f"ema.{name}": value for name, value in (state.ema or {}).items()}
    return {name: value.clone() for name, value in {**state.task, **moments, **averages}.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def break_gradient(learner: Learner, value: float) -> torch.utils.hooks.RemovableHandle:
    """Every gradient of one weight becomes `value` until the handle is removed; the loss stays as it is."""
    return learner.task.model.norm.weight.register_hook(lambda gradient: torch.full_like(gradient, value))


def test_assertion_08_an_infinite_fp16_gradient_skips_the_step_and_halves_the_scale(cache):
    learner = make_learner(cache, **{"train.precision": "fp16", "train.ema_decay": 0.9})
    run(learner, cache, 0, 2)
    before, scale = snapshot(learner), learner.read().loss_scale
    handle = break_gradient(learner, float("inf"))
    run(learner, cache, 2, 3)
    handle.remove()
    assert_same(snapshot(learner), before)
    assert learner.read().loss_scale == scale / 2 == 32768.0
    assert learner.failed() is None, "an overflow in fp16 is part of the method, not a failure"
    run(learner, cache, 3, 4)
    after = snapshot(learner)
    assert all(
        not torch.equal(after[name], before[name]) for name in ("model.decoder.weight", "ema.model.decoder.weight")
    )


def test_assertion_08_clipping_happens_after_unscale(cache):
    clip = 0.01
    norms = {}
    for precision in ("fp32", "fp16"):
        learner = make_learner(cache, **{"train.precision": precision, "optim.clip": clip})
        run(learner, cache, 0, 1)
        norms[precision] = learner.read().gradient_norm
        clipped = torch.cat([p.grad.flatten() for p in learner.task.model.parameters()]).norm()
        assert clipped.item() == pytest.approx(clip, rel=1e-3), "the gradients that the optimizer saw"
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=2e-2), "reported without the loss scale"
    assert norms["fp32"] > 10 * clip


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_assertion_09_a_broken_gradient_calls_off_its_step_and_all_later_ones(precision, value, cache):
    learner = make_learner(cache, **{"train.precision": precision, "train.ema_decay": 0.9})
    run(learner, cache, 0, 3)
    before = snapshot(learner)
    handle = break_gradient(learner, value)
    run(learner, cache, 3, 4)
    handle.remove()
    run(learner, cache, 4, 7)  # these are finite again, and the host has not looked yet
    assert_same(snapshot(learner), before)
    failure = learner.failed()
    assert failure.step == 3
    assert not torch.isfinite(torch.tensor(failure.gradient_norm))
    assert 0 < failure.loss < 10


def test_assertion_09_a_broken_loss_is_enough(cache, monkeypatch):
    learner = make_learner(cache)
    run(learner, cache, 0, 1)
    before, network = snapshot(learner), learner.network
    # The constant adds infinity to the loss and nothing to any gradient.
    monkeypatch.setattr(
        learner, "network", lambda *a, **o: {name: x + float("inf") for name, x in network(*a, **o).items()}
    )
    run(learner, cache, 1, 2)
    assert_same(snapshot(learner), before)
    assert learner.failed().step == 1 and learner.failed().loss == float("inf")


def test_a_step_gives_finite_gradients_to_every_parameter(cache):
    learner = make_learner(cache, **{"model.drop_path": 0.0})
    run(learner, cache, 0, 1)
    missing = [name for name, p in learner.task.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@pytest.mark.parametrize("changes", [{"train.micro_batch": 4}, {"train.micro_batch": 1}])
def test_accumulation_is_the_same_step(changes, cache):
    whole, parts = make_learner(cache, **{"optim.eps": 1e-3}), make_learner(cache, **changes, **{"optim.eps": 1e-3})
    for learner in (whole, parts):
        run(learner, cache, 0, 3)
    torch.testing.assert_close(parts.task.state_dict(), whole.task.state_dict(), rtol=1e-4, atol=1e-6)
    ours, theirs = parts.read(), whole.read()
    assert (ours.loss, ours.metrics) == (pytest.approx(theirs.loss, rel=1e-5), pytest.approx(theirs.metrics, rel=1e-5))


@pytest.mark.parametrize("level", ["cheap", "blocks"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputation_is_the_same_step(level, precision, cache):
    changes = {"train.precision": precision}
    plain, recomputed = make_learner(cache, **changes), make_learner(cache, **changes, **{"train.recompute": level})
    for learner in (plain, recomputed):
        run(learner, cache, 0, 2)
    assert_same(snapshot(recomputed), snapshot(plain))


@pytest.mark.parametrize("objective", OBJECTIVE)
def test_every_objective_learns(objective, cache):
    learner = make_learner(cache, **OBJECTIVE[objective], **{"optim.lr": 3e-3, "optim.warmup_epochs": 0})
    run(learner, cache, 0, 1)
    first = learner.read().loss
    run(learner, cache, 1, 19)
    learner.read()
    run(learner, cache, 19, 20)
    assert learner.read().loss < first - 0.1


def test_precisions_compute_in_their_type(cache):
    seen = {}
    for precision in ("fp32", "bf16", "fp16"):
        learner = make_learner(cache, **{"train.precision": precision})
        learner.task.model.blocks[0].mlp.fc1.register_forward_hook(
            lambda module, inputs, output, key=precision: seen.update({key: output.dtype})
        )
        run(learner, cache, 0, 1)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in learner.task.model.parameters())
    assert seen == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def test_a_backend_that_cannot_run_or_is_wrong_stops_the_run_before_it_starts(cache, monkeypatch):
    with pytest.raises(ConfigError, match=r"train.backend: unknown backend 'fast'; backends are auto, reference, sdpa"):
        make_learner(cache, **{"train.backend": "fast"})
    with pytest.raises(ConfigError, match=r"train.backend: backend 'triton' cannot run here: "):
        make_learner(cache, **{"train.backend": "triton"})
    task = make_learner(cache).task
    asked = []

    def agreement(backend, device, dtype, shape):
        asked.append((backend, str(device), dtype, shape.tokens, shape.size))
        return Agreement(outputs=1.5, gradients=0.2)

    monkeypatch.setattr(two_stream, "two_stream_agreement", agreement)
    with pytest.raises(ConfigError, match=r"computes wrong attention on cuda: its errors are 1.5 .*train.backend sdpa"):
        task.check(torch.device("cuda"), torch.float32)
    model = task.config
    assert asked == [("auto", "cuda", torch.float32, model.tokens, model.width // model.heads)]


def test_what_is_drawn_depends_on_seed_and_step_only(cache):
    task, other = make_learner(cache).task, make_learner(cache).task
    torch.rand(7)
    draws, again = task.draw(8, StepRng(0, 5)), other.draw(8, StepRng(0, 5))
    assert draws.keys() == {"permutation", "keep", "factors", "order"}
    assert_same(draws, again)
    for rng in (StepRng(0, 6), StepRng(1, 5)):
        assert not torch.equal(draws["permutation"], task.draw(8, rng)["permutation"])
    assert "factors" not in make_learner(cache, **{"data.color_jitter": 0.0}).task.draw(8, StepRng(0, 5))


def test_reading_starts_a_new_mean(cache):
    learner = make_learner(cache)
    losses = []
    for step, batch in enumerate(batches(cache, learner.config, 4)):
        learner.step(step, batch, metrics=step == 3)
        losses.append(learner.read().loss)
    twin = make_learner(cache)
    run(twin, cache, 0, 4)
    numbers = twin.read()
    assert numbers.steps == 4 and numbers.loss == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_assertion_18_no_recompilation_after_warm_up(cache, monkeypatch):
    """Recompilation is decided by the tracer's guards, so the test runs its graphs without generating code for them."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_module(self, backend="eager", **options))
    torch._dynamo.reset()
    learner = make_learner(cache, **{"speed.compile": True, "train.micro_batch": 4, "train.ema_decay": 0.9})
    plain = make_learner(cache, **{"train.micro_batch": 4, "train.ema_decay": 0.9})
    steps = list(batches(cache, learner.config, 8))
    for step, batch in enumerate(steps):
        with torch._dynamo.config.patch(error_on_recompile=step >= 2):
            learner.step(step, batch, metrics=step % 2 == 1)
        plain.step(step, batch, metrics=step % 2 == 1)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0, "nothing was compiled"
    torch.testing.assert_close(learner.task.state_dict(), plain.task.state_dict())
    torch._dynamo.reset()
