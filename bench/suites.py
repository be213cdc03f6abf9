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
from bench.contest import Contest, Rules, lines, measure
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
        path, entries = run_contests(suite, name, contests, rules, options.output)
        paths.append(path)
        for entry in entries if any(contest.verdict for contest in contests) else ():
            wrong += [f"{way} of {entry['name']}" for way, row in entry["ways"].items() if row["status"] == "wrong"]
    if wrong:
        sys.exit(f"python -m bench: wrong results: {', '.join(wrong)}")
    return paths


def chosen(suite: str, options: Options, device: torch.device) -> list[Contest]:
    """The contests of a suite, of all ways or those asked for.

    Raises:
        ValueError: there is no such way in the suite.
    """
    contests = CONTESTS[suite](options, device)
    known = sorted({way for contest in contests for way in contest.ways})
    if unknown := sorted(set(options.ways) - set(known)):
        raise ValueError(f"--ways: {suite} has no {', '.join(unknown)}; its ways are {', '.join(known)}")
    wanted = options.ways or known
    return [replace(c, ways=tuple(way for way in c.ways if way in {*wanted, c.base})) for c in contests]


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
) -> tuple[Path, list[dict[str, Any]]]:
    """Measure contests in turn, print them, and keep a record; what there is survives an interruption."""
    device = rules.device
    draft = records.Draft(suite, name, output)
    entries: list[dict[str, Any]] = []
    stopped = None
    # A CPU is named as one, also on a machine with a GPU.
    results = {"device": records.cpu_name()} if device.type == "cpu" else {}
    results |= {
        "measured_on": device.type, "repeats": rules.repeats, "stopped": None,
        "state_before": records.device_state(device), "rates": asdict(rules.rates) if rules.rates else None,
        "contests": entries,
    }  # fmt: skip
    print(f"{suite} on {'a CPU' if device.type == 'cpu' else 'a GPU'}: {results['state_before']['name']}", flush=True)
    with sigterm_interrupts():
        try:
            for contest in contests:
                if rules.deadline.passed():
                    stopped = f"time limit after {len(entries)} of {len(contests)} contests"
                    break
                entries.append(measure(contest, rules))
                print("\n".join(lines(entries[-1])), flush=True)
                draft.write(results)
        except KeyboardInterrupt:
            stopped = f"interrupted after {len(entries)} of {len(contests)} contests"
        draft.write(results | {"stopped": stopped, "state_after": records.device_state(device)})
        path = draft.finish()
    print(f"stopped: {stopped}\nrecord: {path}" if stopped else f"record: {path}", flush=True)
    return path, entries
