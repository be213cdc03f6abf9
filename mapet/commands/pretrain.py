"""`mapet pretrain`."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING

from mapet.config import MODEL_PRESETS, RunConfig
from mapet.errors import ConfigError
from mapet.options import FIELD_OF, Pretrain
from mapet.recipes import recipe
from mapet.settings import as_text, change, parse_assignments, settings, value_of

if TYPE_CHECKING:
    from mapet.train import TrainResult

DOC_WIDTH = 96


def run(options: Pretrain) -> int:
    """Pre-train, and say where the results are. The exit code is 130 or 143 for a run that a signal ended."""
    config = run_config(options)
    if options.list_options:
        print_options(config)
        return 0
    from mapet.train import pretrain  # imports torch, which --list-options has no need of

    result = pretrain(config)
    if os.environ.get("RANK", "0") == "0":
        print(summary(config, result), flush=True)
    return result.exit_code


def run_config(options: Pretrain) -> RunConfig:
    """The recipe, or the defaults, the model's preset, then every option given. ConfigError if they cannot work."""
    config = recipe(options.recipe) if options.recipe else RunConfig()
    values = parse_assignments(options.set)
    if options.fresh:
        _add(values, "train.resume", False, "--fresh")
    for option, name in FIELD_OF.items():
        if (value := getattr(options, option)) is not None:
            _add(values, name, value, f"--{option.replace('_', '-')}")
    preset = MODEL_PRESETS[options.model] if options.model else {}
    return change(config, {f"model.{name}": size for name, size in preset.items()} | values)


def print_options(config: RunConfig) -> None:
    """Every field of a configuration as --set takes it, what is allowed, and what it means."""
    for setting in settings().values():
        print(f"{setting.name}={as_text(value_of(config, setting.name)):<{40 - len(setting.name)}} {setting.allowed}")
        for line in textwrap.wrap(setting.doc, width=DOC_WIDTH):
            print(f"    {line}")


def summary(config: RunConfig, result: TrainResult) -> str:
    """Where the results are, and what can be done with them."""
    output = config.train.output
    lines = [f"{result.step} of {result.last_step} steps are done; newest checkpoint: {result.checkpoint}"]
    if result.best_loss is not None:
        lines.append(f"smallest loss {result.best_loss:.4f}, at step {result.best_step}")
    lines.append(f"numbers: {output}/metrics.jsonl; curves: tensorboard --logdir {output}/tensorboard")
    if result.step == result.last_step:
        lines.append(f"next: mapet probe --checkpoint {output} --images LABELLED-IMAGES")
        lines.append(f"      mapet export --checkpoint {output} --output {output}/timm")
    return "\n".join(lines)


def _add(values: dict[str, object], name: str, value: object, option: str) -> None:
    if name in values:
        raise ConfigError(f"{option} and --set {name}=... say the same; give one of them")
    values[name] = value
