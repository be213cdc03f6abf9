"""Every way of every contest as a benchmark: pytest bench/ --benchmark-json out.json (bench/conftest.py).

The group of a benchmark is its contest and phase; errors and peak memory are in extra_info.
"""

from __future__ import annotations

import time

import pytest
import torch

from bench.conftest import Enter
from bench.contest import Contest, Rules
from bench.records import device_state

WARM_UP = 2


def device_time() -> float:
    """Seconds, read when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.benchmark(timer=device_time)
def test_way(benchmark, enter: Enter, rules: Rules, contest: Contest, way: str, phase: str) -> None:
    entrants, rows = enter(contest)
    row = rows[way]
    if row.get("status") in ("unavailable", "not run"):
        pytest.skip(f"{row['status']}: {row['reason']}")
    if way not in entrants:
        pytest.fail(f"{row['status']}: {row['reason']}; {row.get('error_share', '')}", pytrace=False)
    timed = entrants[way].phases[phase]
    benchmark.group = f"{contest.suite}: {contest.name}: {phase}"
    benchmark.extra_info |= {
        "measured_on": rules.device.type, "machine": device_state(rules.device)["name"], "suite": contest.suite,
        "contest": contest.name, "way": way, "phase": phase, "base": contest.base, **contest.sizes,
        "dtype": contest.dtype, "of_a_round": timed.count, **row,
    }  # fmt: skip
    benchmark.pedantic(timed.call, setup=lambda: (timed.prepare(), {}), rounds=rules.repeats, warmup_rounds=WARM_UP)
