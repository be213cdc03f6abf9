"""`mapet pretrain`."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

from mapet.checked import environment_number
from mapet.commands.options import Pretrain
from mapet.config import RunConfig, change
from mapet.errors import ConfigError
from mapet.words import say

if TYPE_CHECKING:
    from mapet.training.loop import TrainResult


def run(options: Pretrain) -> int:
    """Pre-train, and say where the results are. The exit code is 130 or 143 for a run that a signal ended."""
    config = run_config(options)
    check_processes(options)
    from mapet.training.loop import pretrain  # imports torch

    result = pretrain(config)
    if os.environ.get("RANK", "0") == "0":
        say(summary(config, result))
    return result.exit_code


def run_config(options: Pretrain) -> RunConfig:
    """The configuration that the options give."""
    return change(options.run, {"train.resume": False}) if options.fresh else options.run


def check_processes(options: Pretrain) -> None:
    """ConfigError if --gpus says another number of processes than this run has."""
    size = environment_number("WORLD_SIZE")
    if options.gpus is not None and options.gpus != size:
        raise ConfigError(
            f"--gpus {options.gpus}, but this run has {size} process{'es' * (size > 1)}, one per GPU: start it with "
            f"`torchrun --nproc-per-node {options.gpus} -m mapet pretrain`, or ask `mapet plan --gpus {options.gpus}`"
        )


def summary(config: RunConfig, result: TrainResult) -> str:
    """Where the results are, and what can be done with them."""
    output = config.train.output
    done = f"{result.step} of {result.last_step} steps are done"
    if result.step > result.last_step:
        done = f"nothing to do: {result.step} steps are done, {result.last_step} were asked for"
    lines = [f"{done}; newest checkpoint: {result.checkpoint or 'none yet'}"]
    if result.best_loss is not None:
        lines.append(f"smallest loss {result.best_loss:.4f}, at step {result.best_step}")
    lines.append(f"numbers: {output}/metrics.jsonl; curves: tensorboard --logdir {output}/tensorboard")
    if result.step >= result.last_step:
        typed = shlex.quote(str(output))
        lines.append(f"next: mapet probe --checkpoint {typed} --images LABELLED-IMAGES")
        lines.append(f"      mapet export --checkpoint {typed} --output {typed}/timm")
    return "\n".join(lines)
