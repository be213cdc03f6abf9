"""Time calls on a device: ways in turn, the cache cold, device events on a GPU and the wall clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

FEWEST_REPEATS = 3
HEAD_START = 8
"""Cache flushes before a timed call. They also keep the GPU busy (about 1 ms) while the host queues the call, so that
short calls are not charged for Python."""


class CpuClock:
    """Wall-clock time; the cache is left as it is."""

    def time(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What the call returned, and its seconds."""
        start = time.perf_counter()
        result = call()
        return result, time.perf_counter() - start


class CudaClock:
    """Device time between two events, after a buffer of at least twice the L2 cache was written."""

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.empty(max(2 * cache, 256 << 20), dtype=torch.uint8, device=device)

    def time(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What the call returned, and its seconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(HEAD_START):
            self.buffer.zero_()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end) / 1e3


Clock = CpuClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    """The clock of a CPU or CUDA device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Deadline:
    """A time limit in seconds from now on."""

    seconds: float
    now: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self.now())

    def passed(self) -> bool:
        """Whether the limit is over."""
        return self.now() >= self.start + self.seconds


def repeats_for(seconds: float, most: int, budget: float) -> int:
    """Repeats of something that takes `seconds`: as many as fit the budget, from FEWEST_REPEATS to `most`."""
    return max(min(FEWEST_REPEATS, most), min(most, int(budget / max(seconds, 1e-9))))


def interleaved(
    ways: Mapping[str, Any],
    clock: Clock,
    *,
    repeats: int,
    budget: float,
    deadline: Deadline,
    guard: Callable[[Callable[[], Any]], tuple[Any, Any | None]],
    sample: Callable[[Any, Clock], dict[str, float]] = lambda way, clock: way.sample(clock),
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
    """Time the ways in turn: one sample of each, then the next repeat. Every way is warmed up first.

    What was timed is returned whenever the deadline passes: where that is before the first repeat, the warm-up's last
    sample of each way that came so far.

    Args:
        repeats: samples of each way; a slow one gets fewer, so that it takes about `budget` seconds.
        deadline: when it has passed, no further way is warmed up and no further repeat starts.
        guard: call -> (result, reason); the reason is why the call did not work, or None.
        sample: times a way once, (way, clock) -> seconds by phase; its own method where not given.

    Returns:
        (seconds, reasons): by way and phase, a list of seconds; and by way, why it dropped out.
    """
    seconds: dict[str, dict[str, list[float]]] = {}
    warm: dict[str, dict[str, list[float]]] = {}
    reasons: dict[str, Any] = {}
    wanted: dict[str, int] = {}
    for name, way in ways.items():
        if deadline.passed():
            break
        taken, reason = guard(partial(sample, way, clock))
        if reason is None and sum(taken.values()) <= budget:  # a way that is so slow needs no more warming up
            taken, reason = guard(partial(sample, way, clock))
        if reason is not None:
            reasons[name] = reason
            continue
        wanted[name] = repeats_for(sum(taken.values()), repeats, budget)
        seconds[name], warm[name] = {}, {phase: [value] for phase, value in taken.items()}
    for repeat in range(max(wanted.values(), default=0)):
        if deadline.passed():
            break
        for name in [name for name, count in wanted.items() if repeat < count and name not in reasons]:
            taken, reason = guard(partial(sample, ways[name], clock))
            if reason is not None:
                reasons[name] = reason
                continue
            for phase, value in taken.items():
                seconds[name].setdefault(phase, []).append(value)
    return {name: taken or warm[name] for name, taken in seconds.items() if name not in reasons}, reasons
