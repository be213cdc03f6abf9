"""What a harvest says should be changed first: launch configurations that won, and a ranked list by simple rules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.harvest_data import Config, Harvest, Shape, Timing
from bench.harvest_floors import KERNELS, TABLE

LEAST_GAIN = 0.03
"""Gain in speed that is worth a change; less is within the spread of repeated runs."""
BUSY = 70.0
"""Percent of its peak above which a unit is what the kernel waits for."""
LONG_SCOREBOARD = 0.3
"""Share of the stalls that wait for global memory above which they are worth hiding."""


@dataclass(frozen=True)
class Winner:
    """The configuration of a kernel that is fastest over all shapes at which it and today's were timed.

    Attributes:
        gain: today's time over the winner's, minus 1; geometric mean over the shapes.
        at_target: the same at the target's shape, if it was timed there.
        clear: whether the ranges from p20 to p80 at the target are apart.
    """

    op: str
    dtype: str
    today: Config
    best: Config
    gain: float
    shapes: int
    at_target: float | None
    clear: bool

    @property
    def worth_it(self) -> bool:
        """Whether the launch table should follow."""
        return self.best != self.today and self.gain >= LEAST_GAIN and self.clear


@dataclass(frozen=True)
class Advice:
    """A thing to change. rank: lower comes first; then by gain, a share of the time of what it is about."""

    rank: int
    gain: float
    text: str


def configurations(harvest: Harvest, op: str, dtype: str) -> dict[Config, dict[Shape, Timing]]:
    """Timings of ours by configuration and shape, from parts that time several in turn; the most repeats count."""
    times = [time for time in harvest.timings(op=op, way="ours", dtype=dtype) if time.config is not None]
    contests = {time.part: {x.config for x in times if x.part == time.part} for time in times}
    found: dict[Config, dict[Shape, Timing]] = {}
    for time in sorted(times, key=lambda time: time.repeats):
        if len(contests[time.part]) > 1:
            found.setdefault(time.config, {})[time.shape] = time
    return found


def winners(harvest: Harvest) -> list[Winner]:
    """Of every kernel and dtype whose present configuration was timed beside others."""
    found = []
    for dtype in sorted({time.dtype for time in harvest.times}):
        for op in KERNELS:
            timed = configurations(harvest, op, dtype)
            base = [config for config, times in timed.items() if any(time.default for time in times.values())]
            if base and (won := winner(op, dtype, base[0], timed)) is not None:
                found.append(won)
    return found


def winner(op: str, dtype: str, base: Config, timed: Mapping[Config, Mapping[Shape, Timing]]) -> Winner | None:
    """Over the shapes at which most configurations were timed; None where today's was timed alone."""
    counts = {shape: sum(shape in times for times in timed.values()) for shape in timed[base]}
    most = max(counts.values())
    shapes = [shape for shape, count in counts.items() if count == most]
    if most == 1:
        return None

    def gain(config: Config) -> float:
        logs = [math.log(timed[base][shape].p50 / timed[config][shape].p50) for shape in shapes]
        return math.exp(sum(logs) / len(logs)) - 1

    best = max((config for config, times in timed.items() if times.keys() >= set(shapes)), key=gain)
    target = [shape for shape in shapes if shape.is_target]
    at_target = timed[base][target[0]].p50 / timed[best][target[0]].p50 - 1 if target else None
    clear = all(timed[best][shape].p80 < timed[base][shape].p20 for shape in target or shapes)
    return Winner(op, dtype, base, best, gain(best), len(shapes), at_target, clear)


def snippet(found: Sequence[Winner]) -> list[str]:
    """What to paste into kernels/launch.py, for the winners that are worth it."""
    lines = []
    for x in found:
        if x.worth_it:
            lines += [
                f"# {TABLE[x.op]}, {x.dtype}, head size 64, target.has_wgmma: {x.gain:.1%} faster than {x.today}",
                f"return LaunchConfig(rows={x.best.rows}, keys={x.best.keys}, warps={x.best.warps}, "
                f"stages={x.best.stages})",
            ]
    return lines


@dataclass(frozen=True)
class Counters:
    """What Nsight Compute counted for one launch, in percent of the peak; None where a metric did not come back."""

    kernel: str
    issue: float | None
    l2: float | None
    dram: float | None
    tensor: float | None
    occupancy: float | None
    stalls: Mapping[str, float]

    @property
    def long_scoreboard(self) -> float | None:
        """Its share of all stalls."""
        total = sum(self.stalls.values())
        return self.stalls.get("long_scoreboard", 0.0) / total if total else None


def counters(harvest: Harvest) -> list[Counters]:
    """Of each kernel, the last row."""
    rows = {row["kernel"]: row["metrics"] for row in harvest.of("counters") if isinstance(row["metrics"], dict)}
    return [counted(kernel, metrics) for kernel, metrics in rows.items()]


def counted(kernel: str, metrics: Mapping[str, Any]) -> Counters:
    """The metrics of the rules, under the names that versions of ncu give them."""

    def first(*patterns: str) -> float | None:
        for pattern in patterns:
            values = [value for name, value in numbers.items() if re.search(pattern, name)]
            if values:
                return max(values)
        return None

    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    stalls = {}
    for name, value in numbers.items():
        # Per instruction issued, or as a share of the warps' latency, by version.
        if match := re.search(r"issue_stalled_(\w+?)_per_(?:issue_active|warp_active)(?:\.|$)", name):
            stalls[match[1]] = max(value, stalls.get(match[1], 0.0))
    stalls.pop("selected", None)  # a warp that issues does not wait
    return Counters(
        kernel,
        issue=first(r"sm__inst_issued\.avg\.pct_of_peak", r"sm__issue_active.*pct", r"smsp__issue_active\.avg\.pct"),
        l2=first(r"^lts__throughput.*pct_of_peak", r"^lts__t_sectors\.avg\.pct"),
        dram=first(r"dram_+throughput.*pct_of_peak"),
        tensor=first(r"pipe_tensor.*pct_of_peak"),
        occupancy=first(r"^sm__warps_active\.avg\.pct"),
        stalls=stalls,
    )


MODES = (
    ("eager", "compiled", "compile by default on a GPU"),
    ("eager", "eager_skip_dropped", "speed.skip_dropped on by default in eager mode"),
    ("eager_skip_dropped", "eager", "speed.skip_dropped off by default in eager mode"),
    ("eager", "graphs", "record the step as a CUDA graph by default"),
    ("compiled", "compiled_graphs", "a CUDA graph on top of the compiled step"),
)
"""(slower mode, faster mode, what to do where it is faster)."""


def advice(harvest: Harvest) -> list[Advice]:
    """What to change, the first thing first: what is wrong, what failed, then the gains by their size."""
    found = [*of_failures(harvest), *of_counters(harvest), *of_configurations(harvest), *of_modes(harvest)]
    return sorted(found, key=lambda x: (x.rank, -x.gain))


def of_failures(harvest: Harvest) -> Iterator[Advice]:
    """Wrong results before all, then parts that brought nothing home."""
    for row in harvest.of("check"):
        if not row["ok"]:
            text = f"Mend {row['what']} in {row.get('dtype')}: its result is wrong"
            if row.get("error") is not None and row.get("allowed") is not None:
                text += f" (error {row['error']:.2e}, allowed {row['allowed']:.2e})"
            yield Advice(0, math.inf, f"{text}; no speed counts before.")
    for name, outcome in harvest.outcomes.items():
        if outcome.get("status") not in ("ok", "skipped"):
            yield Advice(1, 0.0, f"Mend the part {name}: {outcome.get('status')}; a second call runs it again.")


def of_configurations(harvest: Harvest) -> Iterator[Advice]:
    """Launch configurations that are faster than today's."""
    for x in winners(harvest):
        if x.worth_it:
            yield Advice(
                2, x.gain,
                f"{TABLE[x.op]} ({x.dtype}): {x.best} in place of {x.today}, {x.gain:.1%} faster (shapes: {x.shapes}).",
            )  # fmt: skip


def of_modes(harvest: Harvest) -> Iterator[Advice]:
    """Defaults of the step."""
    for model in dict.fromkeys(row["model"] for row in harvest.of("step", way="ours")):
        speeds = {row["mode"]: row["images_per_s"] for row in harvest.of("step", way="ours", model=model)
                  if row.get("backend", "auto") == "auto" and not row.get("tuned")}  # fmt: skip
        for slower, faster, what in MODES:
            if slower in speeds and faster in speeds and (gain := speeds[faster] / speeds[slower] - 1) >= LEAST_GAIN:
                yield Advice(
                    2, gain,
                    f"Step of ViT-{model[0].upper()}: {what}: {speeds[faster]:,.0f} images/s in place of "
                    f"{speeds[slower]:,.0f}, {gain:.1%} faster.",
                )  # fmt: skip


def shown(percent: float | None) -> str:
    """A percentage, or that there is none."""
    return "not measured" if percent is None else f"{percent:.0f} %"


def of_counters(harvest: Harvest) -> Iterator[Advice]:
    """What the kernels wait for, the busiest unit first."""
    for x in counters(harvest):
        if x.issue is not None and x.issue > BUSY:
            yield Advice(3, x.issue, f"{x.kernel}: issue slots busy {x.issue:.0f} % of the time: fewer instructions.")
        if (share := x.long_scoreboard) is not None and share > LONG_SCOREBOARD:
            yield Advice(
                3, 100 * share,
                f"{x.kernel}: {share:.0%} of the stalls wait for global memory (long scoreboard): more stages, and more"
                f" programs on a processor (occupancy {shown(x.occupancy)}).",
            )  # fmt: skip
        if x.l2 is not None and x.l2 > BUSY:
            yield Advice(3, x.l2, f"{x.kernel}: L2 busy {x.l2:.0f} % of the time: keep K and V resident.")
