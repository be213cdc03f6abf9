"""python -m bench tune: time other tiles for the Triton kernels on this GPU, and say what the launch table should hold.

For each kernel, dtype and head size: candidates that can work by their size are compiled ahead of time; those that
spill registers or need too much shared memory are dropped; the others must give the present entry's results and are
timed, with the present entry, at three shapes. The table's source is not changed: what to paste is printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import records, timing
from bench.attention_ways import random_operands
from bench.guard import guarded
from bench.records import device_state
from bench.timing import Clock, Deadline
from mapet_kernels import launch, triton_launch
from mapet_kernels.launch import LaunchConfig
from mapet_kernels.registry import TwoStreamShape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = ("attention_forward", "attention_query_gradient", "attention_key_gradient")
"""Functions of mapet_kernels.launch, in the order of the launches of a forward and backward pass."""

ROWS, KEYS, WARPS, STAGES = (16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
MOST_REGISTERS = 224
"""Registers of a thread that accumulators may take, of 255."""

LEAST_GAIN = 0.03
"""Gain in speed that is worth a new entry; less is within the spread of repeated runs."""


@dataclass(frozen=True)
class Tune:
    """What to tune. The defaults take a few minutes on a GPU machine with 16 cores.

    Attributes:
        kernels: functions of mapet_kernels/launch.py.
        dtypes: "bf16", "fp16", "fp32".
        sizes: head sizes.
        batch_heads: images times heads at N = 197; other lengths get equally many tokens.
        repeats: samples of each candidate in the final round.
        time_limit: seconds after which no further entry is begun.
        workers: processes that compile; 0 compiles in this one.
        output: folder for the record.
    """

    kernels: tuple[str, ...] = KERNELS
    dtypes: tuple[str, ...] = ("bf16", "fp16")
    sizes: tuple[int, ...] = (64,)
    batch_heads: int = 3072
    repeats: int = 20
    time_limit: float = 500.0
    workers: int = 8
    output: Path = records.RESULTS


@dataclass(frozen=True)
class Entry:
    """One place in the launch table, architecture included."""

    kernel: str
    dtype: str
    size: int
    target: launch.Target

    def present(self) -> LaunchConfig:
        """What the table holds now."""
        return getattr(launch, self.kernel)(self.size, DTYPES[self.dtype], self.target)


@dataclass(frozen=True)
class Choice:
    """What was found for an entry. gain: speed of the new configuration over the old one's, 1 where it stays."""

    entry: Entry
    old: LaunchConfig
    new: LaunchConfig
    gain: float
    seconds: dict[LaunchConfig, dict[str, float]]
    rejected: dict[str, int]

    def as_record(self) -> dict[str, Any]:
        """For JSON: the candidates from the fastest on, with milliseconds by shape."""
        ordered = sorted(self.seconds.items(), key=lambda item: _total(item[1]))
        return {
            **asdict(self.entry),
            "old": asdict(self.old),
            "new": asdict(self.new),
            "gain": round(self.gain, 4),
            "rejected": self.rejected,
            "candidates": [
                {**asdict(config), "ms": {name: round(1e3 * s, 4) for name, s in seconds.items()}}
                for config, seconds in ordered
            ],
        }


def run(options: Tune) -> Path:
    """Tune every entry, print what was found, and return the record's path.

    Raises:
        ValueError: there is no GPU that the kernels run on, or an option is unknown.
    """
    check(options)
    if not torch.cuda.is_available():
        raise ValueError("tune times kernels, so it needs a CUDA device, and torch finds none here")
    device = torch.device("cuda")
    target = triton_launch.target(device)
    deadline, clock = Deadline(options.time_limit), timing.clock_for(device)
    state = device_state(device)
    draft = records.Draft("tune", f"sm_{target.architecture}", options.output)
    choices: list[Choice] = []
    entries = [
        Entry(kernel, dtype, size, target)
        for dtype, size, kernel in product(options.dtypes, options.sizes, options.kernels)
    ]
    for entry in entries:
        if deadline.passed():
            print(f"time limit of {options.time_limit:g} s: {len(entries) - len(choices)} entries left as they are")
            break
        choices.append(tune(entry, options, device, clock))
        print(line(choices[-1]), flush=True)
        draft.write({"state": state, "entries": [choice.as_record() for choice in choices]})
    if not choices:
        raise ValueError(f"time_limit of {options.time_limit:g} s is too short for one entry")
    print(f"\n{table(choices)}\nrecord: {(path := draft.finish())}")
    return path


def check(options: Tune) -> None:
    """Raise ValueError for a kernel, dtype or size that is not known."""
    for what, given, known in (("kernels", options.kernels, KERNELS), ("dtypes", options.dtypes, DTYPES)):
        if unknown := set(given) - set(known):
            raise ValueError(f"unknown {what} {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if wrong := [size for size in options.sizes if not 1 <= size <= 128]:
        raise ValueError(f"head sizes must be in [1, 128], got {wrong}")


def tune(entry: Entry, options: Tune, device: torch.device, clock: Clock) -> Choice:
    """Compile, check and time the candidates of an entry, and choose."""
    old = entry.present()
    wanted = list(dict.fromkeys([old, *candidates(entry)]))
    fitting, rejected = compiled(entry, wanted, options.workers)
    shapes = tuning_shapes(entry.size, options.batch_heads)
    runners = {name: Runner(entry, shape, device) for name, shape in shapes.items()}
    fitting = [config for config in fitting if config != old]
    right = [config for config in fitting if all(runner.agrees(config, old) for runner in runners.values())]
    rejected["gives other results, or does not run"] = len(fitting) - len(right)
    quick = measured([old, *right], runners, clock, repeats=3)
    finalists = fastest(quick, 6, always=old)
    seconds = quick | measured(finalists, runners, clock, options.repeats)
    return choose(entry, old, {config: seconds[config] for config in finalists}, rejected)


def candidates(entry: Entry) -> Iterator[LaunchConfig]:
    """Configurations that can work, going by sizes alone."""
    for rows, keys, warps, stages in product(ROWS, KEYS, WARPS, STAGES):
        config = LaunchConfig(rows, keys, warps, stages)
        if can_work(config, entry):
            yield config


def can_work(config: LaunchConfig, entry: Entry) -> bool:
    """Whether tiles in flight fit the shared memory, and accumulators the registers, of a program.

    Operands: `stages` pairs of tiles that pass by, (keys, size) or, for the gradient of keys, (rows, size).
    Accumulators in fp32: scores, in the backward pass also their gradient, and what is summed up, (rows, size) or two
    of (keys, size). A thread has 255 registers.
    """
    size, itemsize = launch.padded_size(entry.size), DTYPES[entry.dtype].itemsize
    by_key = entry.kernel.endswith("key_gradient")
    passes = config.rows if by_key else config.keys
    summed = 2 * config.keys if by_key else config.rows
    score_tiles = 1 if entry.kernel.endswith("forward") else 2
    shared = 2 * config.stages * passes * size * itemsize
    registers = (score_tiles * config.rows * config.keys + summed * size) / (32 * config.warps)
    return shared <= entry.target.shared_memory and registers <= MOST_REGISTERS


def compiled(entry: Entry, configs: Sequence[LaunchConfig], workers: int) -> tuple[list[LaunchConfig], dict[str, int]]:
    """Those that compile without spills within the shared memory, and how many others there are by reason."""
    work = partial(reason_against, entry)
    if workers == 0:
        reasons = list(map(work, configs))
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            reasons = list(pool.map(work, configs))
    counts: dict[str, int] = {}
    for reason in reasons:
        if reason is not None:
            counts[reason] = counts.get(reason, 0) + 1
    return [config for config, reason in zip(configs, reasons, strict=True) if reason is None], counts


def reason_against(entry: Entry, config: LaunchConfig) -> str | None:
    """Compile ahead of time; why the configuration is of no use, or None."""
    from bench import aot  # triton takes its time, and is not installed everywhere

    try:
        with override(entry.kernel, config):
            parts = aot.launches(entry.size, entry.dtype, "plain", entry.target)
        part = parts[KERNELS.index(entry.kernel)]
        report = aot.compile_launch(part, entry.size, entry.dtype, "plain", entry.target)
    except Exception as error:  # the compiler's own errors, of which it has many kinds
        return f"does not compile ({type(error).__name__})"
    return verdict(report.spill_stores + report.spill_loads, report.shared, entry.target)


def verdict(spilled: int, shared: int, target: launch.Target) -> str | None:
    """Why a compiled kernel is of no use, or None. `spilled` and `shared` in bytes."""
    if spilled:
        return "spills registers"
    return "needs too much shared memory" if shared > target.shared_memory else None


@contextmanager
def override(kernel: str, config: LaunchConfig) -> Iterator[None]:
    """Inside, the launch table has this configuration for all sizes, dtypes and architectures of a kernel."""
    with patch.object(launch, kernel, lambda *_: config):
        yield


def tuning_shapes(size: int, batch_heads: int) -> dict[str, TwoStreamShape]:
    """The target shape, a short and a long sequence, with equally many tokens, 12 heads and a quarter not predicted."""
    return {
        f"N={tokens}": TwoStreamShape(
            tokens, round(tokens * 50 / 197), max(1, round(batch_heads * 197 / (12 * tokens))), 12, size
        )
        for tokens in (197, 50, 785)
    }


class Runner:
    """One kernel of an entry on tensors of one shape."""

    def __init__(self, entry: Entry, shape: TwoStreamShape, device: torch.device) -> None:
        from mapet_kernels.two_stream_attention import triton_backend
        from mapet_kernels.two_stream_attention.problem import Problem, Streams

        operands = random_operands(shape, DTYPES[entry.dtype], device)
        problem = Problem(shape.tokens, shape.targets, shape.cuts, True, shape.size**-0.5)
        q = Streams(operands.q_content, operands.q_query)
        k, v = torch.stack([operands.k, operands.v], dim=2).unbind(2)
        d_out = Streams(operands.d_content, operands.d_query)
        out, dq = q.empty_like(), q.empty_like()
        lse = Streams(*(x.new_empty(x.shape[:3], dtype=torch.float32) for x in (out.content, out.query)))
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        triton_backend.forward(q, k, v, out, lse, problem)
        triton_backend.backward(d_out, q, k, v, out, lse, dq, dk, dv, problem)

        def launches() -> list[triton_backend.Launch]:
            forward = triton_backend.forward_launch(q, k, v, out, lse, problem, None, entry.target)
            return [
                forward,
                *triton_backend.backward_launches(d_out, q, k, v, out, lse, dq, dk, dv, problem, None, entry.target),
            ]

        self.entry, self.device, self.launches = entry, device, launches
        self.results: tuple[Tensor, ...] = {
            "attention_forward": (out.content, out.query),
            "attention_query_gradient": (dq.content, dq.query),
            "attention_key_gradient": (dk, dv),
        }[entry.kernel]

    def call(self, config: LaunchConfig) -> Callable[[], None]:
        """The kernel with this configuration, ready to launch; for dK and dV after the statistics they need."""
        with override(self.entry.kernel, config):
            parts = self.launches()
        part = KERNELS.index(self.entry.kernel)
        if part == 2:  # reads the statistics that the kernel of dQ leaves in the same workspace
            parts[1].run(self.device)
        return lambda: parts[part].run(self.device)

    def agrees(self, config: LaunchConfig, old: LaunchConfig) -> bool:
        """Whether the kernel runs and gives what it gives with the old configuration, up to a few roundings."""
        self.call(old)()
        expected = [x.clone() for x in self.results]
        for x in self.results:
            x.fill_(float("nan"))
        _, failure = guarded(lambda: self.call(config)())
        if failure is not None:
            return False
        return all(close(x, e) for x, e in zip(self.results, expected, strict=True))


def close(actual: Tensor, expected: Tensor) -> bool:
    """Whether the largest difference is within 8 roundings of the largest value."""
    largest = expected.abs().max().float()
    return bool((actual.float() - expected.float()).abs().max() <= 8 * torch.finfo(actual.dtype).eps * largest)


def measured(
    configs: Sequence[LaunchConfig], runners: Mapping[str, Any], clock: Clock, repeats: int
) -> dict[LaunchConfig, dict[str, float]]:
    """Median seconds by configuration and shape, the configurations in turn; the first sample of each warms up."""
    seconds: dict[LaunchConfig, dict[str, float]] = {config: {} for config in configs}
    for name, runner in runners.items():
        calls = {config: runner.call(config) for config in configs}
        samples: dict[LaunchConfig, list[float]] = {config: [] for config in configs}
        for _ in range(repeats + 1):
            for config, call in calls.items():
                samples[config].append(clock.time(call)[1])
        for config, values in samples.items():
            seconds[config][name] = median(values[1:])
    return seconds


def fastest(
    seconds: Mapping[LaunchConfig, Mapping[str, float]], count: int, always: LaunchConfig
) -> list[LaunchConfig]:
    """The `count` configurations with the least time, and `always`."""
    ordered = sorted(seconds, key=lambda config: _total(seconds[config]))
    return list(dict.fromkeys([*ordered[:count], always]))


def choose(
    entry: Entry,
    old: LaunchConfig,
    seconds: dict[LaunchConfig, dict[str, float]],
    rejected: dict[str, int],
) -> Choice:
    """The fastest configuration over all shapes if it gains at least LEAST_GAIN, otherwise the old one."""
    best = min(seconds, key=lambda config: _total(seconds[config]))
    gain = math.exp((_total(seconds[old]) - _total(seconds[best])) / len(seconds[old]))
    if gain < 1 + LEAST_GAIN:
        best, gain = old, 1.0
    return Choice(entry, old, best, gain, seconds, rejected)


def _total(seconds: Mapping[str, float]) -> float:
    """Sum of logarithms: every shape counts the same, however long it takes."""
    return sum(math.log(value) for value in seconds.values())


def line(choice: Choice) -> str:
    """One entry for the reader: old, new, gain, and what became of the candidates."""
    entry = choice.entry
    dropped = ", ".join(f"{count} {reason}" for reason, count in choice.rejected.items() if count)
    found = "stays" if choice.new == choice.old else f"-> {_short(choice.new)}, {choice.gain:.2f} times as fast"
    return (
        f"{entry.kernel:26} {entry.dtype} D {entry.size:3} sm_{entry.target.architecture}: {_short(choice.old)} {found}"
        f" ({len(choice.seconds)} timed to the end{'; ' + dropped if dropped else ''})"
    )


def _short(config: LaunchConfig) -> str:
    return f"{config.rows} x {config.keys}, {config.warps} warps, {config.stages} stages"


def table(choices: Sequence[Choice]) -> str:
    """The tuned entries as a Python literal, by (kernel, head size, dtype, architecture)."""
    keys = [(c.entry.kernel, c.entry.size, c.entry.dtype, c.entry.target.architecture) for c in choices]
    lines = [f"    {key!r}: {choice.new!r},".replace("'", '"') for key, choice in zip(keys, choices, strict=True)]
    return "\n".join(["TUNED = {", *lines, "}"])
