"""What a harvest says should be changed first: launch configurations that won, and a ranked list by simple rules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.harvest_data import LEAST_REPEATS, Config, Harvest, Shape, Timing, base_part, in_call
from bench.harvest_floors import KERNELS, TABLE

LEAST_GAIN = 0.03
"""Gain in speed that is worth a change; less is within the spread of repeated runs."""
BUSY = 70.0
"""Percent of its peak above which a unit is what the kernel waits for."""
LONG_SCOREBOARD = 0.3
"""Share of the stalls that wait for global memory above which they are worth hiding."""


@dataclass(frozen=True)
class Pair:
    """Today's configuration of a kernel and another, timed in turn in one part at one shape."""

    today: Timing
    other: Timing

    @property
    def ratio(self) -> float:
        """Today's time over the other's."""
        return self.today.p50 / self.other.p50

    @property
    def repeats(self) -> int:
        """Of the one with fewer."""
        return min(self.today.repeats, self.other.repeats)

    @property
    def clear(self) -> bool:
        """Whether the other is faster by more than the noise: the ranges from p20 to p80 are apart."""
        return self.repeats >= LEAST_REPEATS and self.other.p80 < self.today.p20


@dataclass(frozen=True)
class Winner:
    """The configuration of a kernel that is fastest beside today's, see `winner`.

    Attributes:
        size: of heads.
        gain: today's time over the winner's, minus 1; geometric mean over the shapes at which both were timed.
        at_target: the same at the target's shape, if they were timed there.
        clear: whether it is faster by more than the noise, at the target if they were timed there, else at all shapes.
    """

    op: str
    dtype: str
    size: int
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


Pairs = dict[Config, dict[Shape, Pair]]
"""By configuration and shape; today's configuration stands beside itself."""


def pairs(harvest: Harvest, op: str, dtype: str, size: int) -> tuple[Config | None, Pairs]:
    """(Today's configuration, what was timed beside it); the pair with the most repeats counts, then the newest.

    Where the launch table changed between two calls, today's is the newer one, and what stood beside the other is left
    out.
    """
    groups: dict[tuple[str, Shape], list[Timing]] = {}
    for time in harvest.timings(op=op, way="ours", dtype=dtype):
        if time.config is not None and time.shape.size == size:
            groups.setdefault((time.part, time.shape), []).append(time)
    contests = [
        (base, group)
        for group in groups.values()
        for base in [next((time for time in group if time.default), None)]
        if base is not None and len(group) > 1
    ]
    today = contests[-1][0].config if contests else None
    found: Pairs = {}
    for base, group in contests:
        for time in group if base.config == today else ():
            pair, known = Pair(base, time), found.setdefault(time.config, {})
            if time.shape not in known or pair.repeats >= known[time.shape].repeats:
                known[time.shape] = pair
    return today, found


def winners(harvest: Harvest) -> list[Winner]:
    """Of every kernel, dtype and head size whose present configuration was timed beside others."""
    found = []
    for dtype, size in sorted({(time.dtype, time.shape.size) for time in harvest.times}):
        for op in KERNELS:
            today, timed = pairs(harvest, op, dtype, size)
            if today is not None:
                found.append(winner(op, dtype, size, today, timed))
    return found


def winner(op: str, dtype: str, size: int, today: Config, timed: Pairs) -> Winner:
    """The fastest configuration: the one rule for it, of a page and of the second call.

    Each is compared with today's over the shapes at which both were timed, so that one for which the time did not last
    at some length is not dropped; but the target's shape is among them, if today's was timed there beside any.
    """
    target = {shape for beside in timed.values() for shape in beside if shape.is_target}

    def gain(config: Config) -> float:
        logs = [math.log(pair.ratio) for pair in timed[config].values()]
        return math.exp(sum(logs) / len(logs)) - 1

    best = max((config for config, beside in timed.items() if target <= beside.keys()), key=gain)
    deciding = [timed[best][shape] for shape in target or timed[best]]
    return Winner(
        op, dtype, size, today, best, gain(best), len(timed[best]),
        at_target=deciding[0].ratio - 1 if target else None, clear=all(pair.clear for pair in deciding),
    )  # fmt: skip


def snippet(found: Sequence[Winner]) -> list[str]:
    """What to paste into kernels/launch.py, for the winners that are worth it."""
    lines = []
    for x in found:
        if x.worth_it:
            lines += [
                f"# {TABLE[x.op]}, measured at head size {x.size} in {x.dtype}, target.has_wgmma: {x.gain:.1%} faster "
                f"than {x.today}",
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
    """Of each kernel and call, the last row."""
    rows = {
        f"{row['kernel']}{in_call(row.get('part'))}": row["metrics"]
        for row in harvest.of("counters")
        if isinstance(row["metrics"], dict)
    }
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


REHEARSALS = ("step_volta", "volta_kernels")
"""Parts whose steps are those of another GPU, from which no default of this one follows."""


def advice(harvest: Harvest) -> list[Advice]:
    """What to change, the first thing first: what is wrong, what failed, then the gains by their size.

    A dry run, which measures nothing, asks for nothing.
    """
    if harvest.dry_run:
        return []
    found = [*of_failures(harvest), *of_counters(harvest), *of_configurations(harvest), *of_modes(harvest)]
    return sorted(found, key=lambda x: (x.rank, -x.gain))


def of_failures(harvest: Harvest) -> Iterator[Advice]:
    """Wrong results before all, then parts that brought nothing home."""
    for row in harvest.of("check"):
        if not row["ok"]:
            text = f"Mend {row['what']} in {row.get('dtype')}: its result is wrong{in_call(row.get('part'))}"
            if row.get("error") is not None and row.get("allowed") is not None:
                text += f" (error {row['error']:.2e}, allowed {row['allowed']:.2e})"
            yield Advice(0, math.inf, f"{text}; no speed counts before.")
    newest: dict[str, str] = {}
    for name, outcome in harvest.outcomes.items():
        if outcome.get("status") != "skipped":  # a later call mends it, unless it could not run it
            newest[base_part(name)] = name
    for name in newest.values():
        if (status := harvest.outcomes[name].get("status")) != "ok":
            again = "" if harvest.calls or harvest.is_second else "; a second call runs it again"
            yield Advice(1, 0.0, f"Mend the part {name}: {status}{again}.")


def of_configurations(harvest: Harvest) -> Iterator[Advice]:
    """Launch configurations that are faster than today's."""
    for x in winners(harvest):
        if x.worth_it:
            yield Advice(
                2, x.gain,
                f"{TABLE[x.op]} ({x.dtype}): {x.best} in place of {x.today}, {x.gain:.1%} faster (shapes: {x.shapes}).",
            )  # fmt: skip


def of_modes(harvest: Harvest) -> Iterator[Advice]:
    """Defaults of the step, of modes that were timed in turn: in one part, with one model, dtype and batch."""
    for (part, model, dtype, batch), rows in contests(harvest).items():
        for slower, faster, what in MODES:
            if slower in rows and faster in rows and clearly_faster(rows[faster], rows[slower]):
                speeds = [rows[mode]["images_per_s"] for mode in (faster, slower)]
                gain, step = speeds[0] / speeds[1] - 1, f"Step of ViT-{model[0].upper()}"
                yield Advice(
                    2, gain,
                    f"{step} ({part}, {dtype}, batch {batch}): {what}: {speeds[0]:,.0f} images/s "
                    f"in place of {speeds[1]:,.0f}, {gain:.1%} faster.",
                )  # fmt: skip


def contests(harvest: Harvest) -> dict[tuple[Any, ...], dict[str, Mapping[str, Any]]]:
    """By (part, model, dtype, batch), of each mode of ours the row with the most repeats, then the newest.

    Without the rehearsals of other GPUs, and without launch tables that are not today's.
    """
    found: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in harvest.of("step", way="ours"):
        if (
            row.get("backend", "auto") == "auto"
            and not row.get("tuned")
            and base_part(row.get("part")) not in REHEARSALS
        ):
            key = row.get("part"), row["model"], row.get("dtype", "bf16"), row.get("batch")
            modes = found.setdefault(key, {})
            if row["mode"] not in modes or repeats(row) >= repeats(modes[row["mode"]]):
                modes[row["mode"]] = row
    return found


def repeats(row: Mapping[str, Any]) -> int:
    """Samples of a step; 0 where their number is not known."""
    return row.get("repeats") or 0


def clearly_faster(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """By what is worth a change, and by more than the noise: the ranges from p20 to p80 are apart."""
    return (
        min(repeats(row), repeats(other)) >= LEAST_REPEATS
        and row["images_per_s"] >= (1 + LEAST_GAIN) * other["images_per_s"]
        and row["p80_ms"] < other["p20_ms"]
    )


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
