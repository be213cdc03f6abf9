"""A contest: ways to one result on the same inputs, checked for it, then timed in turn. Both front ends measure by it.

`python -m bench run` records what `measure` returns; `pytest bench/` hands its seconds to pytest-benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import memory, roofline, timing
from bench.guard import Failure, guarded
from bench.records import quantiles
from bench.timing import Clock, Deadline


@dataclass(frozen=True)
class Entrant:
    """A way that is ready to be timed.

    Attributes:
        sample: clock -> seconds by phase, once through.
        results: what is checked against the other ways, before anything is timed; None where there is nothing to check.
        once: a call whose peak memory is told; None where it is not.
        resident: tensors that belong to the way alone and count towards its peak, such as weights.
        facts: what else the record says about the way, read after timing.
        another_task: what the way does instead of the contest's task; timed for context, unchecked, without ratio.
    """

    sample: Callable[[Clock], dict[str, float]]
    results: Callable[[], Any] | None = None
    once: Callable[[], object] | None = None
    resident: Callable[[], Iterable[Tensor]] = tuple
    facts: Callable[[], dict[str, Any]] = dict
    another_task: str = ""


@dataclass(frozen=True)
class Arena:
    """The inputs of a contest, made, and what the ways are held against.

    Attributes:
        ways: name -> builder of an entrant; a builder raises Unavailable where the way does not run.
        judge: results -> errors by part, in units of what is allowed: at most 1 is right.
        costs: what a phase must compute and move at least, by phase, where that is known.
        images: of a sample, to tell images per second; 0 where there are none.
    """

    ways: Mapping[str, Callable[[], Entrant]]
    judge: Callable[[Any], dict[str, float]]
    costs: Mapping[str, roofline.Cost] = field(default_factory=dict)
    images: int = 0


@dataclass(frozen=True)
class Contest:
    """What is compared. Nothing is made until `open`.

    Attributes:
        suite, name: tell one contest from another, in records too.
        sizes: what the record says of the inputs.
        phases: what is timed; ratios are told for each.
        ways: names, in the order of a table.
        base: the way whose time the others' is divided by, ours as a rule, so that a ratio is our speed-up.
        dtype: of matrix products, as the roofline knows it.
    """

    suite: str
    name: str
    sizes: Mapping[str, Any]
    phases: tuple[str, ...]
    ways: tuple[str, ...]
    base: str
    dtype: str
    open: Callable[[], AbstractContextManager[Arena]]


@dataclass(frozen=True)
class Rules:
    """How contests are measured: device, clock, and how often and how long at most."""

    device: torch.device
    clock: Clock
    repeats: int
    budget: float
    """Seconds that the samples of one way may take."""
    deadline: Deadline
    rates: roofline.Rates | None = None


@dataclass(frozen=True)
class Outcome:
    """A measured contest: a row of the record for each way, and the seconds behind it, by way and phase."""

    contest: Contest
    rows: dict[str, dict[str, Any]]
    seconds: dict[str, dict[str, list[float]]]
    costs: Mapping[str, roofline.Cost] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """As it stands in a record."""
        contest = self.contest
        return {
            "name": contest.name, **contest.sizes, "dtype": contest.dtype, "phases": list(contest.phases),
            "base": contest.base, "costs": {phase: asdict(cost) for phase, cost in self.costs.items()},
            "ways": self.rows,
        }  # fmt: skip


def measure(contest: Contest, rules: Rules) -> Outcome:
    """Make the inputs, check every way, and time those that are right; none of this raises for a way that breaks."""
    torch._dynamo.reset()  # shapes of earlier contests do not count towards its limit of recompilations
    outcome, failure = guarded(partial(_measure, contest, rules))
    if failure is not None:
        return Outcome(contest, {name: failure._asdict() for name in contest.ways}, {})
    return outcome


def _measure(contest: Contest, rules: Rules) -> Outcome:
    with contest.open() as arena:
        entrants, rows = prepare(contest, arena, rules)
        seconds, dropped = timing.interleaved(
            entrants,
            rules.clock,
            repeats=rules.repeats,
            budget=rules.budget,
            deadline=rules.deadline,
            guard=guarded,
            sample=lambda entrant, clock: entrant.sample(clock),
        )
        for name, entrant in entrants.items():
            if name in seconds:
                rows[name] |= {"status": "timed", **figures(seconds[name], arena, contest.dtype, rules.rates)}
                rows[name] |= entrant.facts()
            else:
                rows[name] |= (dropped.get(name) or Failure("not run", "time limit"))._asdict()
        add_ratios(rows, contest)
        return Outcome(contest, rows, seconds, arena.costs)


def prepare(contest: Contest, arena: Arena, rules: Rules) -> tuple[dict[str, Entrant], dict[str, dict[str, Any]]]:
    """The ways that give right results, and for every way a row that says what was found."""
    entrants: dict[str, Entrant] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in contest.ways:
        rows[name] = {}
        if rules.deadline.passed():
            rows[name] |= Failure("not run", "time limit")._asdict()
            continue
        entrant, failure = guarded(arena.ways[name])
        if failure is None and entrant.another_task:
            rows[name]["another_task"] = entrant.another_task
        elif failure is None:
            failure = checked(entrant, arena, rows[name])
        if failure is not None:
            rows[name] |= failure._asdict()
            continue
        entrants[name] = entrant
        if entrant.once is not None:
            rows[name]["memory"], why = guarded(
                lambda entrant=entrant: memory.peak(entrant.once, rules.device, entrant.resident)
            )
            if why is not None:
                rows[name]["memory_unknown"] = why.reason
    return entrants, rows


def checked(entrant: Entrant, arena: Arena, row: dict[str, Any]) -> Failure | None:
    """Why the way may not be timed, or None; the row gets its errors."""
    if entrant.results is None:
        row["unchecked"] = "nothing to compare with"
        return None
    errors, failure = guarded(lambda: arena.judge(entrant.results()))
    if failure is not None:
        return failure
    row["error_share"] = {part: round(share, 4) for part, share in errors.items()}
    worst = max(errors, key=lambda part: errors[part] if errors[part] == errors[part] else float("inf"))
    if not errors[worst] <= 1:
        return Failure("wrong", f"{worst} errs {errors[worst]:.3g} times as much as is allowed")
    return None


def figures(
    seconds: Mapping[str, list[float]], arena: Arena, dtype: str, rates: roofline.Rates | None
) -> dict[str, Any]:
    """Quantiles and noise of each phase, and what follows from the medians."""
    timings = {phase: quantiles(values) for phase, values in seconds.items()}
    median = {phase: max(timing["p50_ms"], 1e-6) / 1e3 for phase, timing in timings.items()}
    row: dict[str, Any] = {"timings": timings}
    if arena.images:
        row["images_per_second"] = {phase: round(arena.images / value, 2) for phase, value in median.items()}
    known = [phase for phase in median if phase in arena.costs]
    if known:
        row["tflop_per_s"] = {phase: round(arena.costs[phase].flop / median[phase] / 1e12, 6) for phase in known}
        row["gbyte_per_s"] = {phase: round(arena.costs[phase].bytes / median[phase] / 1e9, 3) for phase in known}
    if known and rates is not None and dtype in rates.flop_per_second:
        row["roofline_fraction"] = {
            phase: round(arena.costs[phase].seconds(rates, dtype) / median[phase], 4) for phase in known
        }
    return row


def add_ratios(rows: Mapping[str, dict[str, Any]], contest: Contest) -> None:
    """How many times as long as the base each other way takes, where both are right and were timed on one task."""
    base = rows.get(contest.base, {})
    if base.get("status") != "timed":
        return
    for name, row in rows.items():
        if name != contest.base and row.get("status") == "timed" and "another_task" not in row:
            row["times_as_long"] = {
                phase: round(timing["p50_ms"] / max(base["timings"][phase]["p50_ms"], 1e-6), 4)
                for phase, timing in row["timings"].items()
                if phase in base["timings"]
            }


def timed_call(phase: str, call: Callable[[], Any], settle: int = 0) -> Callable[[Clock], dict[str, float]]:
    """A sample of one phase: `settle` untimed calls, which bring back a way's own memory blocks, then a timed one."""

    def sample(clock: Clock) -> dict[str, float]:
        for _ in range(settle):
            call()
        return {phase: clock.time(call)[1]}

    return sample


def lines(outcome: Outcome) -> list[str]:
    """A contest for the person watching, a line for each way."""
    said = [f"{outcome.contest.suite}: {outcome.contest.name}"]
    for name, row in outcome.rows.items():
        if row["status"] != "timed":
            said.append(f"  {name:26} {row['status']}: {row['reason']}")
            continue
        parts = []
        for phase, timing_ in row["timings"].items():
            part = f"{phase} {timing_['p50_ms']:10.3f} ms +-{50 * timing_['noise']:.0f} %"
            if phase in row.get("times_as_long", {}):
                part += f" x{row['times_as_long'][phase]:.2f}"
            if phase in row.get("images_per_second", {}):
                part += f" {row['images_per_second'][phase]:.1f} images/s"
            if phase in row.get("roofline_fraction", {}):
                part += f" {100 * row['roofline_fraction'][phase]:.1f} % of roofline"
            parts.append(part)
        note = f"   ({row['another_task']})" if "another_task" in row else ""
        said.append(f"  {name:26} {'   '.join(parts)}{note}")
    return said
