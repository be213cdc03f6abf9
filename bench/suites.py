"""python -m bench run: the suites by name, measured by one set of rules, and their records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench import kernels_suite, kmeans_contest, peers, pretrain, records, roofline, step, timing, tokenize_contest
from bench.contest import Contest, Outcome, Rules, lines, measure
from bench.guard import sigterm_interrupts
from bench.options import DTYPES, Options, check, chosen_device

SUITES: dict[str, Callable[[Options, torch.device], list[Contest]]] = {
    "kernels": kernels_suite.contests,
    "step": step.contests,
    "pretrain": pretrain.contests,
    "tokenize": tokenize_contest.contests,
    "kmeans": kmeans_contest.contests,
    "peers": peers.contests,
}
"""Name -> contests, nothing made yet."""

NEED_RATES = ("kernels", "step", "peers")
"""Suites whose costs are known, and held against this device's own rates."""


def run(options: Options) -> list[Path]:
    """Every suite asked for, a record each; a line for each way. Returns the records' paths.

    Raises:
        ValueError: options that cannot work here.
    """
    device = chosen_device(options.device)
    check(options, device)
    deadline = timing.Deadline(options.time_limit or float("inf"))
    suites = {suite: SUITES[suite](options, device) for suite in options.suite}
    name = f"{'-'.join(options.model)}_{'-'.join(options.dtype)}_{device.type}"
    paths = []
    for suite, contests in suites.items():
        if deadline.passed():
            print(f"{suite}: not run, the time limit of {options.time_limit:g} s has passed")
            continue
        rules = rules_for(options, device, rates=suite in NEED_RATES)
        rules = replace(rules, deadline=deadline)
        paths.append(run_contests(suite, name, contests, rules, options.output))
    return paths


def rules_for(options: Options, device: torch.device, *, rates: bool) -> Rules:
    """Clock, repeats and limits; the defaults keep a CPU run small. `rates`: measure what this device does at best."""
    on_gpu = device.type == "cuda"
    clock = timing.clock_for(device)
    return Rules(
        device,
        clock,
        options.repeats or (20 if on_gpu else 5),
        options.seconds or (3.0 if on_gpu else 20.0),
        timing.Deadline(options.time_limit or float("inf")),
        roofline.measure(device, {name: DTYPES[name] for name in options.dtype}, clock) if rates else None,
    )


def run_contests(suite: str, name: str, contests: Sequence[Contest], rules: Rules, output: Path) -> Path:
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
    return path


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
