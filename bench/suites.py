"""The suites by name, measured by one set of rules, and their records."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench import (
    ablation,
    attention,
    curves,
    kernels_suite,
    kmeans,
    kmeans_fit,
    pretrain,
    records,
    roofline,
    step,
    timing,
    tokenizing,
)
from bench.contest import Contest, Outcome, Rules, lines, measure
from bench.guard import sigterm_interrupts
from bench.options import DTYPES, Options, check, chosen_device

CONTESTS: dict[str, Callable[[Options, torch.device], list[Contest]]] = {
    "kernels": kernels_suite.contests,
    "attention": attention.contests,
    "step": step.contests,
    "ablation": ablation.contests,
    "pretrain": pretrain.contests,
    "tokenize": tokenizing.contests,
    "kmeans": kmeans.contests,
    "kmeans_fit": kmeans_fit.contests,
    "curves": curves.contests,
}
"""Name of a suite -> its contests, nothing made yet."""
NEED_RATES = ("kernels", "attention", "step")
"""Suites whose costs are known, and held against this device's own rates."""


def run(options: Options) -> list[Path]:
    """Every suite asked for, a record each; a line for each way. Returns the records' paths.

    Raises:
        ValueError: options that cannot work here.
        SystemExit: with status 1, after all, where results are wrong that a contest is about.
    """
    device = chosen_device(options.device)
    check(options, device)
    suites = {suite: chosen(suite, options, device) for suite in options.suite}
    name = f"{'-'.join(options.model)}_{'-'.join(options.dtype)}_{device.type}"
    rules = rules_for(options, device)
    paths, wrong = [], []
    for suite, contests in suites.items():
        if rules.deadline.passed():
            print(f"{suite}: not run, the time limit of {options.time_limit:g} s has passed")
            continue
        path, outcomes = run_contests(suite, name, contests, rules, options.output)
        paths.append(path)
        wrong += [
            f"{way} of {outcome.contest.name}"
            for outcome in outcomes
            for way, row in outcome.rows.items()
            if outcome.contest.verdict and row["status"] == "wrong"
        ]
    if wrong:
        sys.exit(f"python -m bench: wrong results: {', '.join(wrong)}")
    return paths


def chosen(suite: str, options: Options, device: torch.device) -> list[Contest]:
    """The contests of a suite, of all ways or those asked for.

    Raises:
        ValueError: there is no such way in the suite.
    """
    contests = CONTESTS[suite](options, device)
    known = {way for contest in contests for way in contest.ways}
    if unknown := set(options.ways) - known:
        raise ValueError(
            f"--ways: {suite} has no {', '.join(sorted(unknown))}; its ways are {', '.join(sorted(known))}"
        )
    if not options.ways:
        return contests
    return [
        replace(contest, ways=tuple(way for way in contest.ways if way in {*options.ways, contest.base}))
        for contest in contests
    ]


def rules_for(options: Options, device: torch.device) -> Rules:
    """Clock, repeats and limits; the defaults keep a CPU run small. Where a suite needs it, what this device does."""
    on_gpu = device.type == "cuda"
    clock = timing.clock_for(device)
    rates = set(options.suite) & set(NEED_RATES)
    return Rules(
        device,
        clock,
        options.repeats or (20 if on_gpu else 5),
        options.seconds or (3.0 if on_gpu else 20.0),
        timing.Deadline(options.time_limit or float("inf")),
        roofline.measure(device, {name: DTYPES[name] for name in options.dtype}, clock) if rates else None,
    )


def run_contests(
    suite: str, name: str, contests: Sequence[Contest], rules: Rules, output: Path
) -> tuple[Path, list[Outcome]]:
    """Measure contests in turn, print them, and keep a record; what there is survives an interruption."""
    device = rules.device
    draft = records.Draft(suite, name, output)
    before, outcomes, stopped = records.device_state(device), [], None
    print(f"{suite} on {'a CPU' if device.type == 'cpu' else 'a GPU'}: {before['name']}", flush=True)
    with sigterm_interrupts():
        try:
            for contest in contests:
                if rules.deadline.passed():
                    stopped = f"time limit after {len(outcomes)} of {len(contests)} contests"
                    break
                outcomes.append(measure(contest, rules))
                print("\n".join(lines(outcomes[-1])), flush=True)
                draft.write(results(outcomes, rules, before, None))
        except KeyboardInterrupt:
            stopped = f"interrupted after {len(outcomes)} of {len(contests)} contests"
        draft.write(results(outcomes, rules, before, stopped))
        path = draft.finish()
    print(f"stopped: {stopped}\nrecord: {path}" if stopped else f"record: {path}", flush=True)
    return path, outcomes


def results(outcomes: Sequence[Outcome], rules: Rules, before: dict[str, Any], stopped: str | None) -> dict[str, Any]:
    """What a record holds besides its environment; a CPU is named as one, also on a machine with a GPU."""
    named = {"device": records.cpu_name()} if rules.device.type == "cpu" else {}
    return named | {
        "measured_on": rules.device.type,
        "repeats": rules.repeats,
        "stopped": stopped,
        "state_before": before,
        "state_after": records.device_state(rules.device),
        "rates": asdict(rules.rates) if rules.rates else None,
        "contests": [outcome.entry() for outcome in outcomes],
    }
