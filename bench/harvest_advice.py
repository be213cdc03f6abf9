"""What a harvest says should be changed first: launch configurations that won, and a ranked list by simple rules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from bench.harvest_data import LEAST_REPEATS, Config, Harvest, Shape, Timing, base_part

LEAST_GAIN = 0.03
"""Gain in speed that is worth a change; less is within the spread of repeated runs."""
TABLE = {"forward": "attention_forward", "dq": "attention_query_gradient", "dkdv": "attention_key_gradient"}
"""Op -> function of kernels/launch.py."""


class Advice(NamedTuple):
    """A thing to change. rank: lower comes first; then by gain, a share of the time of what it is about."""

    rank: int
    gain: float
    text: str


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
    for row in harvest.of("check", ok=False):
        text = f"Mend {row['what']} in {row.get('dtype')}: its result is wrong ({row.get('part')})"
        if row.get("error") is not None and row.get("allowed") is not None:
            text += f", error {row['error']:.2e}, allowed {row['allowed']:.2e}"
        yield Advice(0, math.inf, f"{text}; no speed counts before.")
    # A later call mends a part, unless it could not run it.
    newest = {base_part(name): name for name, x in harvest.outcomes.items() if x.get("status") != "skipped"}
    for name in newest.values():
        if (status := harvest.outcomes[name].get("status")) != "ok":
            again = "" if harvest.calls or harvest.is_second else "; a second call runs it again"
            yield Advice(1, 0.0, f"Mend the part {name}: {status}{again}.")


class Pair(NamedTuple):
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
    """The configuration of a kernel that is fastest beside today's, see `winners`.

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


def winners(harvest: Harvest) -> list[Winner]:
    """The fastest configuration of every kernel, dtype and head size: the one rule, of a page and of the second call.

    Each is compared with today's over the shapes at which both were timed, so that one for which the time did not last
    at some length is not dropped; but the target's shape is among them, if today's was timed there beside any.
    """
    found = []
    for (dtype, size), op in product(sorted({(time.dtype, time.shape.size) for time in harvest.times}), TABLE):
        today, timed = pairs(harvest, op, dtype, size)
        if today is None:
            continue
        target = {shape for beside in timed.values() for shape in beside if shape.is_target}
        gains = {
            config: math.prod(pair.ratio for pair in beside.values()) ** (1 / len(beside)) - 1
            for config, beside in timed.items()
            if target <= beside.keys()
        }
        best = max(gains, key=gains.__getitem__)
        deciding = [timed[best][shape] for shape in target or timed[best]]
        at_target, clear = deciding[0].ratio - 1 if target else None, all(pair.clear for pair in deciding)
        found.append(Winner(op, dtype, size, today, best, gains[best], len(timed[best]), at_target, clear))
    return found


def pairs(harvest: Harvest, op: str, dtype: str, size: int) -> tuple[Config | None, dict[Config, dict[Shape, Pair]]]:
    """(Today's configuration, what was timed beside it); the pair with the most repeats counts, then the newest.

    Where the launch table changed between two calls, today's is the newer one, and what stood beside the other is left
    out.
    """
    groups: dict[tuple[str, Shape], list[Timing]] = {}
    for time in harvest.timings(op=op, way="ours", dtype=dtype):
        if time.config is not None and time.shape.size == size:
            groups.setdefault((time.part, time.shape), []).append(time)
    bases = [next((time for time in group if time.default), None) for group in groups.values() if len(group) > 1]
    today = next((base.config for base in reversed(bases) if base is not None), None)
    found: dict[Config, dict[Shape, Pair]] = {}
    for base in bases:
        if base is not None and base.config == today:
            for time in groups[base.part, base.shape]:
                pair, known = Pair(base, time), found.setdefault(time.config, {})
                if time.shape not in known or pair.repeats >= known[time.shape].repeats:
                    known[time.shape] = pair
    return today, found


def of_configurations(harvest: Harvest) -> Iterator[Advice]:
    """Launch configurations that are faster than today's."""
    for x in winners(harvest):
        if x.worth_it:
            change = f"{x.best} in place of {x.today}, {x.gain:.1%} faster (shapes: {x.shapes})"
            yield Advice(2, x.gain, f"{TABLE[x.op]} ({x.dtype}): {change}.")


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


def of_modes(harvest: Harvest) -> Iterator[Advice]:
    """Defaults of the step, of modes that were timed in turn: in one part, with one model, dtype and batch.

    Of each mode the row with the most repeats counts, then the newest. Launch tables that are not today's do not.
    """
    contests: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in harvest.of("step", way="ours"):
        plain = row.get("backend", "auto") == "auto" and not row.get("tuned")
        if plain and base_part(row.get("part")) not in REHEARSALS:
            key = row.get("part"), row["model"], row.get("dtype", "bf16"), row.get("batch")
            modes = contests.setdefault(key, {})
            if row["mode"] not in modes or repeats(row) >= repeats(modes[row["mode"]]):
                modes[row["mode"]] = row
    for ((part, model, dtype, batch), rows), (slower, faster, what) in product(contests.items(), MODES):
        if slower in rows and faster in rows and clearly_faster(rows[faster], rows[slower]):
            new, old = (rows[mode]["images_per_s"] for mode in (faster, slower))
            step = f"Step of ViT-{model[0].upper()} ({part}, {dtype}, batch {batch})"
            text = f"{step}: {what}: {new:,.0f} images/s in place of {old:,.0f}, {new / old - 1:.1%} faster."
            yield Advice(2, new / old - 1, text)


def repeats(row: Mapping[str, Any]) -> int:
    """Samples of a step; 0 where their number is not known."""
    return row.get("repeats") or 0


def clearly_faster(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """By what is worth a change, and by more than the noise: the ranges from p20 to p80 are apart."""
    enough = min(repeats(row), repeats(other)) >= LEAST_REPEATS
    gains = row["images_per_s"] >= (1 + LEAST_GAIN) * other["images_per_s"]
    return enough and gains and row["p80_ms"] < other["p20_ms"]


METRICS = {
    "issue slots": (r"sm__inst_issued\.avg\.pct_of_peak", r"sm__issue_active.*pct", r"smsp__issue_active\.avg\.pct"),
    "tensor cores": (r"pipe_tensor.*pct_of_peak",),
    "L2": (r"^lts__throughput.*pct_of_peak", r"^lts__t_sectors\.avg\.pct"),
    "DRAM": (r"dram_+throughput.*pct_of_peak",),
    "occupancy": (r"^sm__warps_active\.avg\.pct",),
}
"""Percent of the peak, under the names that versions of ncu give it."""
STALL = re.compile(r"issue_stalled_(\w+?)_per_(?:issue_active|warp_active)(?:\.|$)")
"""Per instruction issued, or as a share of the warps' latency, by version."""
STALLS = "long scoreboard, of stalls"
RULES = (
    ("issue slots", 70, "issue slots busy {:.0f} % of the time: fewer instructions."),
    (STALLS, 30, "{:.0f} % of the stalls wait for global memory (long scoreboard): more stages, or higher occupancy."),
    ("L2", 70, "L2 busy {:.0f} % of the time: keep K and V resident."),
)  # fmt: skip
"""(metric, percent above which it is worth a change, what to do)."""


def counted(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """What Nsight Compute counted for one launch, in percent; None where a metric did not come back."""
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    found: dict[str, float | None] = {}
    for figure, patterns in METRICS.items():
        matches = ([value for name, value in numbers.items() if re.search(pattern, name)] for pattern in patterns)
        found[figure] = next((max(values) for values in matches if values), None)
    stalls: dict[str, float] = {}
    for name, value in numbers.items():
        # A warp that issues does not wait.
        if (match := STALL.search(name)) and match[1] != "selected":
            stalls[match[1]] = max(value, stalls.get(match[1], 0.0))
    total = sum(stalls.values())
    return found | {STALLS: 100 * stalls.get("long_scoreboard", 0.0) / total if total else None}


def counters(harvest: Harvest) -> dict[str, dict[str, float | None]]:
    """By kernel, of the last row."""
    return {row["kernel"]: counted(row["metrics"]) for row in harvest.of("counters")}


def of_counters(harvest: Harvest) -> Iterator[Advice]:
    """What the kernels wait for, the busiest unit first."""
    for (kernel, found), (metric, most, text) in product(counters(harvest).items(), RULES):
        if (value := found[metric]) is not None and value > most:
            yield Advice(3, value, f"{kernel}: {text.format(value)}")
