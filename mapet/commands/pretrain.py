"""`mapet pretrain`."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mapet.checked import environment_number
from mapet.commands.options import FIELD_OF, Plan, Pretrain, as_typed
from mapet.commands.settings import as_text, parse_assignments, settings, value_of
from mapet.config import MODEL_PRESETS, RunConfig, change
from mapet.errors import ConfigError, FieldError
from mapet.recipes import recipe
from mapet.units import gib, parse_bytes
from mapet.words import say

if TYPE_CHECKING:
    from mapet.training.loop import TrainResult

DOC_WIDTH = 96


def run(options: Pretrain) -> int:
    """Pre-train, and say where the results are. The exit code is 130 or 143 for a run that a signal ended."""
    config = run_config(options)
    config, decision = planned(config, options, processes(options))
    if options.list_options:
        print_options(config)
        return 0
    if decision and os.environ.get("RANK", "0") == "0":
        say(decision)
    from mapet.training.loop import pretrain  # imports torch, which --list-options has no need of

    result = pretrain(config)
    if os.environ.get("RANK", "0") == "0":
        say(summary(config, result))
    return result.exit_code


def run_config(options: Pretrain) -> RunConfig:
    """The recipe, or the defaults, the model's preset, then every option given. ConfigError if they cannot work."""
    config = recipe(options.recipe) if options.recipe else RunConfig()
    values = given(options)
    if options.fresh:
        _add(values, "train.resume", False, "--fresh")
    if options.auto_batch:
        _add(values, "train.auto_batch", True, "--auto-batch")
    if values.get("train.budget") and "optim.epochs" in values:
        raise ConfigError("a budget sets the epochs: give train.budget or optim.epochs, not both")
    return changed(config, options, values)


def changed(config: RunConfig, options: Pretrain | Plan, values: Mapping[str, object]) -> RunConfig:
    """The configuration with the model's preset and these values. FieldError names what was typed."""
    preset = MODEL_PRESETS[options.model] if options.model else {}
    try:
        return change(config, {f"model.{name}": size for name, size in preset.items()} | values)
    except FieldError as error:
        if error.name not in values:
            raise
        for option, name in FIELD_OF.items():
            if name == error.name and getattr(options, option, None) is not None:
                raise as_typed(error, option, name) from None
        raise FieldError(error.name, f"--set {error}") from None


def given(options: Pretrain | Plan) -> dict[str, object]:
    """Fields that the options name, by --set or by their short names. ConfigError where they do so twice."""
    values = parse_assignments(options.set)
    for option, name in FIELD_OF.items():
        if (value := getattr(options, option, None)) is not None:
            _add(values, name, value, f"--{option.replace('_', '-')}")
    return values


def processes(options: Pretrain) -> int:
    """Processes of this run; ConfigError if --gpus says another number."""
    size = environment_number("WORLD_SIZE")
    if options.gpus is not None and options.gpus != size:
        raise ConfigError(
            f"--gpus {options.gpus}, but this run has {size} process{'es' * (size > 1)}, one per GPU: start it with "
            f"`torchrun --nproc-per-node {options.gpus} -m mapet pretrain`, or ask `mapet plan --gpus {options.gpus}`"
        )
    return size


def planned(config: RunConfig, options: Pretrain, processes: int) -> tuple[RunConfig, str]:
    """With a limit on memory: the micro-batch and recomputation that fit, unless they are given, and what to say."""
    values = given(options)
    if not config.train.gpu_memory or {"train.micro_batch", "train.recompute"} <= values.keys():
        return config, ""
    from mapet.planning.memory import LEVELS, plan_memory, step_size  # imports torch

    levels = [config.train.recompute] if "train.recompute" in values else LEVELS
    size, limit = step_size(config, processes), parse_bytes(config.train.gpu_memory)
    micro = size.micro_batch if "train.micro_batch" in values else 0
    plan = plan_memory(size, limit, levels=levels, micro_batch=micro)
    fits = change(config, {"train.micro_batch": plan.micro_batch, "train.recompute": plan.recompute})
    return fits, (
        f"planned for {config.train.gpu_memory}: micro-batch {plan.micro_batch}, accumulation {plan.accumulation}, "
        f"recompute {plan.recompute}; {gib(plan.memory.total)} predicted"
    )


def print_options(config: RunConfig) -> None:
    """Every field of a configuration as --set takes it, what is allowed, and what it means."""
    for setting in settings().values():
        value = as_text(value_of(config, setting.name))
        say(f"{setting.name}={value:<{40 - len(setting.name)}} {setting.allowed_values}")
        for line in textwrap.wrap(setting.doc, width=DOC_WIDTH):
            say(f"    {line}")


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


def _add(values: dict[str, object], name: str, value: object, option: str) -> None:
    if name in values:
        raise ConfigError(f"{option} and --set {name}=... say the same; give one of them")
    values[name] = value
