"""Processes that save checkpoints and do not survive it. They live here so that a fresh process can import them."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import torch

from mapet.config import ModelConfig, RunConfig, to_dict
from mapet.objectives import build_task, options
from mapet.training.checkpoint import CheckpointState, CheckpointStore

SMALL = ModelConfig(image_size=16, patch_size=4, width=8, depth=1, heads=2, vocabulary=8)


def make_state(step: int, numbers: int = 1000) -> CheckpointState:
    """A state whose every value says which step it is of."""
    weights = {"weight": torch.full((numbers,), float(step)), "bias": torch.full((3,), step + 0.5)}
    trainer = {"optimizer": {"moment": torch.full((2 * numbers,), -float(step)), "lr": 0.1 * step}, "step": step}
    average = {name: value + 100 for name, value in weights.items()}
    return CheckpointState(weights, trainer, to_dict(RunConfig()), average)


def state_of_a_model(step: int) -> CheckpointState:
    """Weights that fit a model, each of them the step; the moving average 100 more."""
    config = RunConfig(model=SMALL, objective=options("mapet", cut=5))
    task = build_task(config)
    weights, average = (
        {name: torch.full_like(weight, value) for name, weight in task.state_dict().items()}
        for value in (float(step), step + 100.0)
    )
    return dataclasses.replace(make_state(step), task=weights, ema=average, config=to_dict(config))


def save_for_ever(folder: Path, first: int) -> None:
    """Save step after step, as fast as it goes."""
    store, step = CheckpointStore(folder, keep=2), first
    while True:
        store.save(step, make_state(step))
        step += 1


def save_and_die_at_sync(folder: Path, first: int, sync: int) -> None:
    """Save step after step and be killed by SIGKILL when the `sync`-th file or folder is about to be flushed."""
    flush, calls = os.fsync, 0

    def flush_or_die(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == sync:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    os.fsync = flush_or_die
    save_for_ever(folder, first)


def save_with_limit(folder: Path, step: int, limit: int) -> None:
    """Save while no file may grow past `limit` bytes; the error's text goes beside the folder, its code to the exit."""
    import resource

    from mapet.errors import CheckpointError

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        CheckpointStore(folder, keep=1).save(step, make_state(step))
    except CheckpointError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        folder.with_name("error.txt").write_text(str(error))
        raise SystemExit(error.exit_code) from None
