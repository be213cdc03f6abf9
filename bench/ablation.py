"""python -m bench ablation: what each switch of a fast step gains.

The base is the full configuration. Each switch of section `speed` that it has on is turned off in turn, each opt-in
that it has off is turned on where it can run, and the two kinds of recomputation are tried. All ways are timed in turn;
each must have the base's loss and gradients in the first step before it is timed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import options, pretrain, records, step, suites
from bench.contest import Arena, Contest, Entrant
from bench.guard import Unavailable
from bench.options import Options
from bench.roofline import Cost
from mapet.config import RunConfig, SpeedConfig
from mapet.data.cache import TokenCache
from mapet.report.markdown import table

BASE = "base"
TOLERANCE = {"fp8": 5e-2}
"""Of the loss, for switches that change rounding beyond the dtype's own."""
RECOMPUTE = ("cheap", "blocks")
DATA = "device_jitter"
"""The switch that moves work to the data workers: it is timed with the loader, and so is its base."""


@dataclass(frozen=True)
class Ablation:
    """What each switch of the step gains: each one changed in turn.

    Attributes:
        only: these switches only, by their names in section speed, or recompute; all when empty.
        compile: measure the compiled step, which takes a minute or more to compile.
        gpu_memory, jitter, repeats, seconds, time_limit, output: as in `python -m bench run`.
    """

    model: options.ModelName = "tiny"
    batch: int = 0
    dtype: options.Dtype = "bf16"
    device: str | None = None
    image_size: int = 224
    patch_size: int = 16
    cut: int = options.PAPER_CUT
    only: tuple[str, ...] = ()
    compile: bool = True
    gpu_memory: str = ""
    jitter: float = 0.4
    workers: int = 2
    repeats: int = 0
    seconds: float = 0.0
    time_limit: float = 0.0
    output: Path = records.RESULTS


@dataclass(frozen=True)
class Switch:
    """One change of the base: the way's name, and the configuration that it makes of the base's."""

    name: str
    part: str
    """What is switched, as in `Ablation.only`."""
    turned: str
    """"off", "on", or the kind of recomputation."""

    def apply(self, config: RunConfig) -> RunConfig:
        """The base with this one change."""
        if self.part == "recompute":
            return replace(config, train=replace(config.train, recompute=self.turned))
        return replace(config, speed=replace(config.speed, **{self.part: self.turned == "on"}))


def run(made: Ablation) -> Path:
    """Measure, print the table, and keep a record; its path.

    Raises:
        ValueError: options that cannot work here.
    """
    device = options.chosen_device(made.device)
    same = Options(
        ("step",), (made.model,), (made.batch,) if made.batch else (), (made.dtype,), str(device), (made.image_size,),
        (made.patch_size,), made.cut, made.compile, "auto", made.gpu_memory, made.jitter, made.workers, 0, made.repeats,
        made.seconds, made.time_limit, made.output,
    )  # fmt: skip
    options.check(same, device)
    (sizes,) = options.combinations(same, device)
    setting = step.Setting(sizes, device, made.jitter, made.gpu_memory)
    rules = suites.rules_for(same, device, rates=False)
    name = f"{made.model}_{made.dtype}_{device.type}"
    path = suites.run_contests("ablation", name, contests(setting, switches(made), made.workers), rules, made.output)
    print("\n" + "\n".join(as_markdown(json.loads(path.read_text())["contests"])))
    return path


def switches(made: Ablation) -> list[Switch]:
    """Every switch, those that are on by default first; ValueError for an unknown one in `only`."""
    defaults = {field.name: field.default for field in dataclasses.fields(SpeedConfig)}
    found = [
        Switch(f"{name}_{turned}", name, turned) for name, on in defaults.items() for turned in ["off" if on else "on"]
    ]
    found.sort(key=lambda switch: switch.turned == "on")
    found += [Switch(f"recompute_{kind}", "recompute", kind) for kind in RECOMPUTE]
    known = {switch.part for switch in found}
    if unknown := set(made.only) - known:
        raise ValueError(f"--only: unknown switches {', '.join(sorted(unknown))}; they are {', '.join(sorted(known))}")
    found = [switch for switch in found if made.compile or switch.part != "compile"]
    return [switch for switch in found if not made.only or switch.part in made.only]


def contests(setting: step.Setting, chosen: Sequence[Switch], workers: int) -> list[Contest]:
    """The step with every switch but the one that concerns the data; that one with its loader."""
    of_step = [switch for switch in chosen if switch.part != DATA]
    of_data = [switch for switch in chosen if switch.part == DATA] if setting.jitter else []
    found = []
    if of_step:
        found.append(contest(setting, of_step, "", partial(arena, setting, of_step)))
    if of_data:
        found.append(contest(setting, of_data, " with data", partial(data_arena, setting, of_data, workers)))
    return found


def contest(setting: step.Setting, chosen: Sequence[Switch], more: str, opened) -> Contest:
    """The base and its changes."""
    sizes = setting.sizes.record() | {"jitter": setting.jitter, "gpu_memory": setting.memory}
    sizes |= {"speed": dataclasses.asdict(setting.config.speed), "recompute": setting.config.train.recompute}
    ways = (BASE, *(switch.name for switch in chosen))
    return Contest("ablation", setting.sizes.name + more, sizes, ("step",), ways, BASE, setting.sizes.dtype, opened)


@contextmanager
def arena(setting: step.Setting, chosen: Sequence[Switch]) -> Iterator[Arena]:
    """One batch for all, no data side."""
    ways = {switch.name: partial(changed, setting, switch) for switch in chosen}
    cost = Cost(setting.sizes.batch * step.flop_per_image(setting.sizes.model, setting.sizes.cut), 0)
    ways[BASE] = lambda: step.ours(setting, setting.config)
    yield Arena(ways, step.Judge(setting.sizes.dtype), {"step": cost}, setting.sizes.batch)


def changed(setting: step.Setting, switch: Switch) -> Entrant:
    """The step with one change; Unavailable where it cannot run."""
    if (reason := reason_against(switch, setting.device)) is not None:
        raise Unavailable(reason)
    entrant = step.ours(setting, switch.apply(setting.config))
    tolerance = TOLERANCE.get(switch.part)
    return replace(entrant, results=lambda: replace(entrant.results(), tolerance=tolerance))


@contextmanager
def data_arena(setting: step.Setting, chosen: Sequence[Switch], workers: int) -> Iterator[Arena]:
    """Steps fed from a generated token cache."""
    with pretrain.generated_cache(setting.sizes.model, max(1024, 2 * setting.sizes.batch)) as path:
        cache, count = TokenCache.open(path), pretrain.STEPS[setting.device.type]

        def entrant(config: RunConfig) -> Entrant:
            return pretrain.our_training(setting, config, cache, workers, count)

        ways = {switch.name: partial(entrant, switch.apply(setting.config)) for switch in chosen}
        ways[BASE] = partial(entrant, setting.config)
        yield Arena(ways, step.Judge(setting.sizes.dtype), images=setting.sizes.batch)


def reason_against(switch: Switch, device: torch.device) -> str | None:
    """Why an opt-in cannot run here, or None."""
    if switch.part == "cuda_graphs" and device.type != "cuda":
        return "needs a CUDA device"
    if switch.part == "fp8":
        if importlib.util.find_spec("torchao") is None:
            return "the package torchao is not installed"
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            return "needs a CUDA device of compute capability 8.9 or newer"
    return None


@dataclass(frozen=True)
class Gain:
    """What one switch does to the step: `gain` is how much faster the step is with it on; bytes at the peak."""

    switch: str
    base: str
    step_ms: float
    base_ms: float
    gain: float
    noise: float
    more_bytes: int | None


def gains(entry: Mapping[str, Any]) -> list[Gain]:
    """Switches that were timed, the largest gain first. Recomputation is opted in: its gain is in memory."""
    rows = entry["ways"]
    base = rows.get(BASE, {})
    if base.get("status") != "timed":
        return []
    base_time, base_bytes = base["timings"]["step"], (base.get("memory") or {}).get("peak_bytes")
    found = []
    for name, row in rows.items():
        if name == BASE or row.get("status") != "timed":
            continue
        turned_off = name.endswith("_off")
        taken = row["timings"]["step"]
        gain = taken["p50_ms"] / base_time["p50_ms"] if turned_off else base_time["p50_ms"] / taken["p50_ms"]
        peak = (row.get("memory") or {}).get("peak_bytes")
        more = peak - base_bytes if peak is not None and base_bytes is not None else None
        noise = max(taken.get("noise", 0.0), base_time.get("noise", 0.0))
        switch = name.removesuffix("_off").removesuffix("_on")
        found.append(
            Gain(switch, "on" if turned_off else "off", taken["p50_ms"], base_time["p50_ms"], gain - 1, noise, more)
        )
    return sorted(found, key=lambda gain: -gain.gain)


def as_markdown(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of a record's contests, sorted by gain, then what was not timed and why."""
    rows, untimed = [], []
    for gain in sorted((g for entry in entries for g in gains(entry)), key=lambda g: -g.gain):
        memory = "" if gain.more_bytes is None else f"{gain.more_bytes / 2**20:+.0f} MiB"
        rows.append((
            f"`{gain.switch}`", gain.base, f"{gain.base_ms:.1f}", f"{gain.step_ms:.1f}", f"{100 * gain.gain:+.1f} %",
            f"{100 * gain.noise:.0f} %", memory,
        ))  # fmt: skip
    for entry in entries:
        untimed += [
            f"- `{name}`: {row['status']}, {row['reason']}"
            for name, row in entry["ways"].items()
            if row.get("status") != "timed"
        ]
    head = ("switch", "in the base", "base ms", "changed ms", "faster with it on", "noise", "peak memory when changed")
    return [*(table(head, rows) if rows else ["No switch was timed."]), *(["", *untimed] if untimed else [])]
