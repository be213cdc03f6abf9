"""What train.precision auto stands for: a function of the device, settled before anything of a run is saved."""

from __future__ import annotations

from dataclasses import replace

import torch

from mapet.config import Precision, RunConfig
from mapet.distributed import World
from mapet.errors import ConfigError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
BF16_SINCE = (8, 0)
"""Compute capability from which a GPU multiplies bf16 matrices; older ones emulate it."""


def automatic(capability: tuple[int, int] | None) -> Precision:
    """The precision for a GPU of this compute capability, or for a CPU (None).

    bf16 has the range of fp32 and needs no loss scaling. On a CPU it is fast on few processors only, so fp32 there.
    """
    if capability is None:
        return "fp32"
    return "bf16" if capability >= BF16_SINCE else "fp16"


def settled(config: RunConfig, world: World) -> tuple[RunConfig, str]:
    """The configuration with a precision by name, the same in every process, and where auto was given, why it is that.

    ConfigError where the processes' GPUs would differ.
    """
    if config.train.precision != "auto":
        return config, ""
    device = world.device
    mine = automatic(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)
    everywhere = sorted(set(world.gather(mine)))
    if len(everywhere) > 1:
        raise ConfigError(
            f"train.precision auto would be {' and '.join(everywhere)} in different processes of this run, whose GPUs "
            "differ; name one: fp16 runs on all of them"
        )
    return replace(config, train=replace(config.train, precision=mine)), f"what auto takes on {device}"


def check_precision(precision: str, device: torch.device) -> None:
    """ConfigError when a GPU has no bf16 of its own; ValueError for auto, which `settled` settles before."""
    if precision == "auto":
        raise ValueError("train.precision auto is settled before a learner is made: precision.settled")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"train.precision bf16 needs a GPU of compute capability 8.0 or newer, {device} is older: fp16"
        )
