"""Every way of every contest as a benchmark: pytest bench/ --benchmark-json out.json (bench/conftest.py).

The group of a benchmark is its contest and phase. Quantiles, noise, errors, rates and ratio are in extra_info.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.conftest import PLAYBACK, Measured


@pytest.mark.benchmark(timer=PLAYBACK)
def test_way(benchmark, measured: Measured, machine: dict[str, Any], contest: str, way: str, phase: str) -> None:
    outcome = measured(contest)
    row = outcome.rows[way]
    if row["status"] in ("unavailable", "not run"):
        pytest.skip(f"{row['status']}: {row['reason']}")
    if row["status"] != "timed":
        pytest.fail(f"{row['status']}: {row['reason']}; {row.get('error_share', '')}", pytrace=False)
    benchmark.group = f"{contest}: {phase}"
    made, device = outcome.contest, measured.rules.device
    benchmark.extra_info |= {
        "measured_on": device.type, "machine": machine["name"], "suite": made.suite, "contest": made.name,
        "way": way, "phase": phase, "base": made.base, **made.sizes, "dtype": made.dtype,
        **{name: value for name, value in row.items() if name not in ("timings", "status")},
        **row["timings"][phase],
    }  # fmt: skip
    seconds = outcome.seconds[way][phase]
    PLAYBACK.load(seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds))
