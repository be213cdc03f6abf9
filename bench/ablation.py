"""What each switch of a fast step gains: compile, CUDA graphs, fp8, skipping dropped images, and recomputation.

The base is the default configuration; each other way has one change. Each must have the base's loss and gradients in
the first step before it is timed. A ratio above 1 is how many times as long the step takes with the change.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench import options, step
from bench.contest import Arena, Contest, Entrant
from bench.guard import Unavailable
from mapet.config import RunConfig

BASE = "base"
CHANGES: dict[str, tuple[str, str, Any]] = {
    "skip_dropped_off": ("speed", "skip_dropped", False),
    "compile_on": ("speed", "compile", True),
    "cuda_graphs_on": ("speed", "cuda_graphs", True),
    "fp8_on": ("speed", "fp8", True),
    "recompute_cheap": ("train", "recompute", "cheap"),
    "recompute_blocks": ("train", "recompute", "blocks"),
}
"""Way -> section and field of the configuration, and the value that the field gets."""
TOLERANCE = {"fp8_on": 5e-2}
"""Of the loss, for changes that round otherwise than the dtype does."""


def contests(chosen: options.Options, device: torch.device) -> list[Contest]:
    """The base and its changes, for each combination of sizes."""
    ways = (BASE, *(name for name in CHANGES if chosen.compile or name != "compile_on"))
    return [
        setting.contest("ablation", ways, arena, speed=dataclasses.asdict(setting.config.speed))
        for setting in step.settings(chosen, device)
    ]


@contextmanager
def arena(setting: step.Setting) -> Iterator[Arena]:
    """One batch for all, no data side."""
    ways = {name: partial(changed, setting, name) for name in CHANGES}
    ways[BASE] = lambda: step.ours(setting, setting.config)
    yield Arena(ways, step.Judge(setting.sizes.dtype), setting.cost, setting.sizes.batch)


def changed(setting: step.Setting, name: str) -> Entrant:
    """The step with one change; Unavailable where it cannot run."""
    if (reason := reason_against(name, setting.device)) is not None:
        raise Unavailable(reason)
    entrant = step.ours(setting, apply(setting.config, *CHANGES[name]))
    return replace(entrant, results=lambda: replace(entrant.results(), tolerance=TOLERANCE.get(name)))


def apply(config: RunConfig, section: str, field: str, value: Any) -> RunConfig:
    """The configuration with one change."""
    return replace(config, **{section: replace(getattr(config, section), **{field: value})})


def reason_against(name: str, device: torch.device) -> str | None:
    """Why a change cannot run here, or None."""
    if name == "cuda_graphs_on" and device.type != "cuda":
        return "needs a CUDA device"
    if name == "fp8_on":
        if importlib.util.find_spec("torchao") is None:
            return "the package torchao is not installed"
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            return "needs a CUDA device of compute capability 8.9 or newer"
    return None
