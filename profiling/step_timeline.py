"""Where the time of a training step goes: python profiling/step_timeline.py --workload.device cuda

Runs a few steps under torch.profiler and prints the time of each part of the step, forward and backward, with the gaps
in which the device had nothing to do and the calls in which the host waited for it. On a CPU the time is that of the
operators themselves. The trace can be opened in Perfetto or chrome://tracing.

Backward operators belong to the part whose forward operator made their autograd node (both carry one sequence number).
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.profiler import ProfilerActivity, profile
from workload import PARTS, PREFIX, Workload, named_parts, synchronize

WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "aten::_local_scalar_dense",
)
"""Calls in which the host waits for the device."""


@dataclass(frozen=True)
class Timeline:
    """What to run, and where the results go."""

    workload: Workload = field(default_factory=Workload)
    steps: int = 3
    output: Path = Path("runs/profile")


@dataclass(frozen=True)
class PartTime:
    """Milliseconds a step of one part."""

    part: str
    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Summary:
    """A step in milliseconds. `busy` and `idle` are the device's; `waits` are calls of the host, by name, per step."""

    wall: float
    parts: list[PartTime]
    busy: float
    idle: float
    waits: dict[str, tuple[float, float]]


def main() -> None:
    options = tyro.cli(Timeline, description=__doc__)
    summary, trace = measure(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "step_timeline.json").write_text(json.dumps(asdict(summary), indent=1) + "\n")
    print(as_table(summary))
    print(f"trace: {trace}\nnumbers: {options.output / 'step_timeline.json'}")


def measure(options: Timeline) -> tuple[Summary, Path]:
    """Profile the steps; the summary and the path of the Chrome trace."""
    step, device = options.workload.build(), torch.device(options.workload.device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    for number in range(2):
        step(number)
    synchronize(device)
    with named_parts(step), profile(activities=activities) as profiler:
        start = time.perf_counter()
        for number in range(2, 2 + options.steps):
            step(number)
        synchronize(device)
        wall = (time.perf_counter() - start) * 1e3 / options.steps
    options.output.mkdir(parents=True, exist_ok=True)
    trace = options.output / "step_trace.json"
    profiler.export_chrome_trace(str(trace))
    return summarise(profiler.events(), wall, options.steps, on_device=len(activities) > 1), trace


def summarise(events: Iterable[Any], wall: float, steps: int, *, on_device: bool) -> Summary:
    """Add up the profiler's events, whose times are in microseconds."""
    events = list(events)
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    part_of_node = {
        event.sequence_nr: part
        for event in host
        if event.sequence_nr >= 0 and not _is_backward(event) and (part := _range_of(event)) is not None
    }
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in host:
        if event.name.startswith(PREFIX):
            continue
        node = _backward_node(event)
        part = (_range_of(event) if node is None else part_of_node.get(node.sequence_nr)) or "other"
        own = sum(kernel.duration for kernel in event.kernels) if on_device else event.self_cpu_time_total
        times[part][node is not None] += own / 1e3 / steps
    parts = [PartTime(name, *times[name]) for name in PARTS if name in times]
    busy = _covered([e.time_range for e in events if e.device_type == torch.autograd.DeviceType.CUDA]) / 1e3 / steps
    busy = busy if on_device else sum(part.total for part in parts)
    waits: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in host:
        if event.name in WAITS:
            waits[event.name][0] += 1 / steps
            waits[event.name][1] += event.time_range.elapsed_us() / 1e3 / steps
    return Summary(wall, parts, busy, max(wall - busy, 0.0), {name: tuple(values) for name, values in waits.items()})


def as_table(summary: Summary) -> str:
    """The summary as a Markdown table, the longest part first."""
    lines = ["| part | forward ms | backward ms | ms | of the step |", "| --- | ---: | ---: | ---: | ---: |"]
    for part in sorted(summary.parts, key=lambda part: -part.total):
        share = part.total / summary.wall
        lines.append(f"| {part.part} | {part.forward:.2f} | {part.backward:.2f} | {part.total:.2f} | {share:.1%} |")
    lines.append(f"| step | | | {summary.wall:.2f} | busy {summary.busy / summary.wall:.1%} |")
    lines.append(f"\nidle {summary.idle:.2f} ms a step")
    for name, (calls, milliseconds) in summary.waits.items():
        lines.append(f"host waits: {name}, {calls:.1f} calls a step, {milliseconds:.2f} ms")
    return "\n".join(lines)


def _range_of(event: Any) -> str | None:
    """The innermost named part around an event."""
    while event is not None and not event.name.startswith(PREFIX):
        event = event.cpu_parent
    return event and event.name.removeprefix(PREFIX)


def _backward_node(event: Any) -> Any | None:
    """The event of the autograd node that an event runs in."""
    while event is not None and not (_is_backward(event) and event.sequence_nr >= 0):
        event = event.cpu_parent
    return event


def _is_backward(event: Any) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def _covered(ranges: Iterable[Any]) -> float:
    """Microseconds covered by at least one range."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted((r.start, r.end) for r in ranges):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


if __name__ == "__main__":
    main()
