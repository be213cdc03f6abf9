"""A contest: ways to one result on the same inputs, checked for it, then timed in turn.

`python -m bench run` times them by `measure`; `pytest bench/` opens the same contests and times by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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
class Timed:
    """What is timed of a phase: `call(*prepare())`, of which `prepare` is not timed.

    count: of what the seconds are told, such as steps, in one call.
    """

    call: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = tuple
    count: int = 1

    def seconds(self, clock: Clock) -> float:
        """Of one."""
        arguments = self.prepare()
        return clock.time(lambda: self.call(*arguments))[1] / self.count


@dataclass(frozen=True)
class Entrant:
    """A way that is ready to be timed.

    Attributes:
        phases: what is timed, by phase.
        results: what is checked against the other ways, before anything is timed; None where there is nothing to check.
        once: a call whose peak memory is told; None where it is not.
        resident: tensors that belong to the way alone and count towards its peak, such as weights.
        facts: what else the record says about the way, read after timing.
        another_task: what the way does instead of the contest's task; timed for context, unchecked, without ratio.
    """

    phases: Mapping[str, Timed]
    results: Callable[[], Any] | None = None
    once: Callable[[], object] | None = None
    resident: Callable[[], Iterable[Tensor]] = tuple
    facts: Callable[[], dict[str, Any]] = dict
    another_task: str = ""

    def sample(self, clock: Clock) -> dict[str, float]:
        """Seconds by phase, once through."""
        return {phase: timed.seconds(clock) for phase, timed in self.phases.items()}


def two_passes(forward: Callable[[], Any], backward: Callable[[Any], Any]) -> dict[str, Timed]:
    """A forward pass, the backward pass of what it returned, and both in one go."""
    return {
        "forward": Timed(forward),
        "backward": Timed(backward, lambda: (forward(),)),
        "both": Timed(lambda: backward(forward())),
    }


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
        verdict: wrong results of a way end the command with status 1.
    """

    suite: str
    name: str
    sizes: Mapping[str, Any]
    phases: tuple[str, ...]
    ways: tuple[str, ...]
    base: str
    dtype: str
    open: Callable[[], AbstractContextManager[Arena]]
    verdict: bool = False


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


SHOWN = {
    "times_as_long": "x{:.2f}",
    "images_per_second": "{:.1f} images/s",
    "roofline_fraction": "{:.1%} of roofline",
}
"""What `lines` tells of a phase besides its time."""
Rows = dict[str, dict[str, Any]]
"""For each way what the record says: its status, then figures or the reason why there are none."""


@contextmanager
def opened(contest: Contest, rules: Rules) -> Iterator[tuple[Arena, dict[str, Entrant], Rows]]:
    """The inputs, the ways that give right results, and for every way a row that says what was found."""
    torch._dynamo.reset()  # shapes of earlier contests do not count towards its limit of recompilations
    with contest.open() as arena:
        entrants: dict[str, Entrant] = {}
        rows: Rows = {}
        for name in contest.ways:
            rows[name], failure = {}, Failure("not run", "time limit")
            if not rules.deadline.passed():
                entrant, failure = guarded(arena.ways[name])
                failure = failure or checked(entrant, arena, rows[name])
            if failure is not None:
                rows[name] |= failure._asdict()
                continue
            entrants[name] = entrant
            if entrant.once is not None:
                measured, why = guarded(partial(memory.peak, entrant.once, rules.device, entrant.resident))
                rows[name] |= {"memory": measured} if why is None else {"memory_unknown": why.reason}
        yield arena, entrants, rows


def checked(entrant: Entrant, arena: Arena, row: dict[str, Any]) -> Failure | None:
    """Why the way may not be timed, or None; the row gets its errors."""
    if entrant.another_task or entrant.results is None:
        row |= {"another_task": entrant.another_task} if entrant.another_task else {"unchecked": "nothing to compare"}
        return None
    errors, failure = guarded(lambda: arena.judge(entrant.results()))
    if failure is not None:
        return failure
    row["error_share"] = {part: round(share, 4) for part, share in errors.items()}
    worst = max(errors, key=lambda part: errors[part] if errors[part] == errors[part] else float("inf"))
    if not errors[worst] <= 1:
        return Failure("wrong", f"{worst} errs {errors[worst]:.3g} times as much as is allowed")
    return None


def measure(contest: Contest, rules: Rules) -> dict[str, Any]:
    """Make the inputs, check every way, and time those that are right: the contest as it stands in a record.

    None of this raises for a way that breaks.
    """
    found, failure = guarded(partial(_measure, contest, rules))
    rows, costs = found or ({name: failure._asdict() for name in contest.ways}, {})
    return {
        "name": contest.name, **contest.sizes, "dtype": contest.dtype, "phases": list(contest.phases),
        "base": contest.base, "costs": {phase: asdict(cost) for phase, cost in costs.items()}, "ways": rows,
    }  # fmt: skip


def _measure(contest: Contest, rules: Rules) -> tuple[Rows, Mapping[str, roofline.Cost]]:
    with opened(contest, rules) as (arena, entrants, rows):
        seconds, dropped = timing.interleaved(
            entrants, rules.clock, repeats=rules.repeats, budget=rules.budget, deadline=rules.deadline, guard=guarded
        )
        for name, entrant in entrants.items():
            if name in seconds:
                rows[name] |= {"status": "timed", **figures(seconds[name], arena, contest.dtype, rules.rates)}
                rows[name] |= entrant.facts()
            else:
                rows[name] |= (dropped.get(name) or Failure("not run", "time limit"))._asdict()
        add_ratios(rows, contest.base)
        return rows, arena.costs


def figures(
    seconds: Mapping[str, list[float]], arena: Arena, dtype: str, rates: roofline.Rates | None
) -> dict[str, Any]:
    """Quantiles and noise of each phase, and what follows from the medians."""
    row: dict[str, Any] = {"timings": {phase: quantiles(values) for phase, values in seconds.items()}}
    for phase, timing_ in row["timings"].items():
        median = max(timing_["p50_ms"], 1e-6) / 1e3
        if arena.images:
            row.setdefault("images_per_second", {})[phase] = round(arena.images / median, 2)
        if (cost := arena.costs.get(phase)) is not None:
            row.setdefault("tflop_per_s", {})[phase] = round(cost.flop / median / 1e12, 6)
            row.setdefault("gbyte_per_s", {})[phase] = round(cost.bytes / median / 1e9, 3)
            if rates is not None and dtype in rates.flop_per_second:
                share = round(cost.seconds(rates, dtype) / median, 4)
                row.setdefault("roofline_fraction", {})[phase] = share
    return row


def add_ratios(rows: Rows, base: str) -> None:
    """How many times as long as the base each other way takes, where both are right and were timed on one task."""
    if rows.get(base, {}).get("status") != "timed":
        return
    shortest = {phase: max(timing_["p50_ms"], 1e-6) for phase, timing_ in rows[base]["timings"].items()}
    for name, row in rows.items():
        if name != base and row["status"] == "timed" and "another_task" not in row:
            row["times_as_long"] = {
                phase: round(timing_["p50_ms"] / shortest[phase], 4) for phase, timing_ in row["timings"].items()
            }


def lines(entry: Mapping[str, Any]) -> list[str]:
    """A measured contest for the person watching, a line for each way."""
    said = [entry["name"]]
    for name, row in entry["ways"].items():
        if row["status"] != "timed":
            said.append(f"  {name:26} {row['status']}: {row['reason']}")
            continue
        parts = [f"({row['another_task']})"] if "another_task" in row else []
        for phase, timing_ in row["timings"].items():
            parts.append(f"  {phase} {timing_['p50_ms']:10.3f} ms +-{50 * timing_['noise']:.0f} %")
            for key, words in SHOWN.items():
                if phase in row.get(key, {}):
                    parts.append(words.format(row[key][phase]))
        said.append(f"  {name:26} {' '.join(parts)}")
    return said
