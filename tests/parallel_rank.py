"""Sharded weights beside copies of them, as one of several processes.

As a script: parallel_rank.py CACHE CHECKPOINTS REPORT VARIANT... The main process writes what was found as JSON to
REPORT. CHECKPOINTS is the store of a run of one process.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_run import OBJECTIVE, make_config
from torch import Tensor, nn

from mapet.config import SpeedConfig
from mapet.data.cache import TokenCache
from mapet.data.loader import make_loader
from mapet.distributed import World, connect
from mapet.objectives import two_stream as base
from mapet.task import Batch
from mapet.training.checkpoint import CheckpointStore
from mapet.training.learner import Learner
from mapet.training.parallel import gathered, is_sharded
from mapet.training.schedule import plan_steps

CHANGES = {"optim.eps": 1e-3, "train.ema_decay": 0.9, "train.micro_batch": 1, "optim.warmup_epochs": 0}
SWITCHES = [field.name for field in dataclasses.fields(SpeedConfig) if field.name not in ("cuda_graphs", "fp8")]
VARIANTS = {
    "fp32": {},
    "bf16": {"train.precision": "bf16"},
    "fp16": {"train.precision": "fp16"},
    "cheap": {"train.recompute": "cheap"},
    "blocks": {"train.recompute": "blocks", "train.micro_batch": 2},
    "pim": OBJECTIVE["pim"],
    "mim": OBJECTIVE["mim"],
    "no class token": {"model.class_token": False},
    **{switch: {f"speed.{switch}": not getattr(SpeedConfig(), switch)} for switch in SWITCHES},
}


def learner_for(world: World, cache: TokenCache, parallel: str, **changes: object) -> Learner:
    """One of `make_config`'s runs with CHANGES."""
    config = make_config(cache.path, Path("unused"), **{**CHANGES, **changes, "train.parallel": parallel})
    return Learner(config, world, plan_steps(config, len(cache), world.size))


def run(learner: Learner, cache: TokenCache, first: int, last: int) -> list[float]:
    """Steps first to last - 1; their losses."""
    losses = []
    for step, batch in zip(range(first, last), batches(learner, cache, first, last), strict=True):
        learner.step(step, batch, metrics=True)
        losses.append(learner.read().loss)
    return losses


def batches(learner: Learner, cache: TokenCache, first: int, last: int) -> list[Batch]:
    config, world = learner.config, learner.world
    return list(
        make_loader(
            cache,
            seed=config.train.seed,
            global_batch=config.optim.global_batch,
            start_step=first,
            stop_step=last,
            rank=world.rank,
            world_size=world.size,
        )
    )


def flat(value: object, name: str = "") -> dict[str, Tensor]:
    """Tensors in nested dicts, by path."""
    if isinstance(value, dict):
        return {key: leaf for k, v in value.items() for key, leaf in flat(v, f"{name}/{k}").items()}
    return {name: value} if isinstance(value, Tensor) else {}


def snapshot(learner: Learner) -> dict[str, Tensor]:
    """Weights, moments and averages, whole and copied, in every process."""
    average = learner.average.weights if learner.average else {}
    state = {"task": learner.task.state_dict(), "optimizer": learner.optimizer.state_dict()["state"], "ema": average}
    return {name: value.detach().clone() for name, value in flat(gathered(state, keep=True)).items()}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative to the tolerance of float32: 1e-6 + 1e-4 of the value."""
    assert ours.keys() == theirs.keys()
    return max(float(((a - theirs[n]).abs() / (1e-6 + 1e-4 * theirs[n].abs())).max()) for n, a in ours.items())


def compare(world: World, cache: TokenCache, changes: dict[str, object]) -> dict[str, object]:
    """Two steps in copies and in parts; graphs are those that torch.compile made of the latter."""
    copies = learner_for(world, cache, "ddp", **changes)
    theirs = run(copies, cache, 0, 2)
    torch._dynamo.utils.counters.clear()
    parts = learner_for(world, cache, "fsdp", **changes)
    ours = run(parts, cache, 0, 2)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert all(is_sharded(parameter) for parameter in parts.task.parameters())
    return {"losses": [ours, theirs], "difference": difference(snapshot(parts), snapshot(copies)), "graphs": graphs}


def break_part(learner: Learner, world: World, value: float) -> Callable[[], None]:
    """Each step's gradients get `value` in the last process's part of one weight; call the result to end that."""
    unscale = learner.scaler.unscale_

    def broken(optimizer: torch.optim.Optimizer) -> None:
        if world.rank == world.size - 1:
            learner.task.model.decoder.weight.grad.to_local().view(-1)[0] = value
        unscale(optimizer)

    learner.scaler.unscale_ = broken
    return lambda: setattr(learner.scaler, "unscale_", unscale)


def broken_gradient(world: World, cache: TokenCache, precision: str, value: float) -> dict[str, object]:
    """A gradient that is not finite in one process's part only."""
    learner = learner_for(world, cache, "fsdp", **{"train.precision": precision})
    run(learner, cache, 0, 2)
    before, scale = snapshot(learner), learner.scaler.get_scale()
    mend = break_part(learner, world, value)
    run(learner, cache, 2, 3)
    mend()
    after = snapshot(learner)
    failure = learner.failed()
    return {
        "changed": [name for name in after if not torch.equal(before[name], after[name])],
        "scales": world.gather([scale, learner.scaler.get_scale()]),
        "failed": world.gather(failure and failure.step),
    }


def clipped(world: World, cache: TokenCache) -> dict[str, object]:
    """The norm that is reported, and that of the gradients after clipping to 0.01, in parts and in copies."""
    found = {}
    for parallel in ("ddp", "fsdp"):
        learner = learner_for(world, cache, parallel, **{"optim.clip": 0.01})
        learner.step(0, batches(learner, cache, 0, 1)[0], metrics=False)
        gradients = [parameter.grad for parameter in learner.task.parameters()]
        norm = torch.cat([g.flatten() for g in gathered(gradients, keep=True)]).norm()
        found[parallel] = [learner.read().gradient_norm, float(norm)]
    return found


def loaded(world: World, cache: TokenCache, store: CheckpointStore) -> list[str]:
    """Names that differ after the checkpoint of one process was loaded in parts and saved again.

    In the other processes: names of weights that they hold whole, which only the main process needs.
    """
    config = make_config(cache.path, Path("unused"), **CHANGES, **{"train.parallel": "fsdp"})
    learner = Learner(config, world, plan_steps(config, len(cache), world.size))
    state = store.load(store.newest_valid()).state
    learner.load(state)
    again = learner.state()
    if not world.is_main:
        return [name for name, value in {**again.task, **again.ema}.items() if value is not None]
    ours, theirs = ({**flat(vars(s)), **flat(vars(s)["trainer"])} for s in (again, state))
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def held(world: World, cache: TokenCache) -> dict[str, int]:
    """Bytes of this process's parts after a step."""
    learner = learner_for(world, cache, "fsdp")
    run(learner, cache, 0, 1)
    moments = flat(learner.optimizer.state_dict()["state"])
    parts = {
        "weights": list(learner.task.parameters()),
        "gradients": [parameter.grad for parameter in learner.task.parameters()],
        "optimizer": [value for value in moments.values() if value.ndim],
        "average": list(learner.average.weights.values()),
    }
    return {name: sum(part.to_local().nbytes for part in values) for name, values in parts.items()}


def without_code_generation() -> None:
    """torch.compile runs its graphs as they are: what is compiled is decided before, and counted."""
    compile_module = nn.Module.compile
    nn.Module.compile = lambda self, **options: compile_module(self, backend="eager", **options)


def main(cache: str, checkpoints: str, report: str, *variants: str) -> None:
    torch.set_num_threads(1)
    without_code_generation()
    base.RECOMPUTED_AT_ONCE = 1  # so that two images are two parts
    opened, store = TokenCache.open(Path(cache)), CheckpointStore(Path(checkpoints))
    with connect("cpu") as world:
        found = {name: compare(world, opened, VARIANTS[name]) for name in variants}
        others = {
            "fp16 overflow": broken_gradient(world, opened, "fp16", float("inf")),
            "fp32 nan": broken_gradient(world, opened, "fp32", float("nan")),
            "clipped": clipped(world, opened),
            "loaded": world.gather(loaded(world, opened, store)),
            "held": world.gather(held(world, opened)),
        }
        if world.is_main:
            Path(report).write_text(json.dumps({"variants": found, **others}))


if __name__ == "__main__":
    main(*sys.argv[1:])
