"""pytest bench/ --benchmark-json out.json: the suites of `python -m bench run` as benchmarks of pytest-benchmark.

pytest bench/ --bench="--suite kernels --dtype fp32 bf16" takes the options of `run`. Contests are made and checked as
there; pytest-benchmark times each way by itself, in rounds of its own, by a timer that waits for the device.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import tyro

from bench import suites
from bench.contest import Contest, Entrant, Rows, Rules, opened
from bench.options import Options, check, chosen_device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench", default="", help="options of python -m bench run, as one text")


def chosen_options(config: pytest.Config) -> Options:
    """What --bench asks for; UsageError where it cannot work here."""
    try:
        options = tyro.cli(Options, args=shlex.split(config.getoption("--bench")))
        check(options, chosen_device(options.device))
    except ValueError as error:
        raise pytest.UsageError(f"--bench: {error}") from error
    except SystemExit as end:  # tyro has said why
        raise pytest.UsageError("--bench takes the options of python -m bench run") from end
    return options


def chosen_contests(options: Options) -> dict[str, Contest]:
    """Contests of the suites asked for, by a title that a benchmark's JSON can hold."""
    device = chosen_device(options.device)
    return {f"{c.suite}: {c.name}": c for suite in options.suite for c in suites.chosen(suite, options, device)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each way and phase of each contest of the suites asked for."""
    if not {"contest", "way", "phase"} <= set(metafunc.fixturenames):
        return
    cases = [
        pytest.param(contest, way, phase, id=f"{title}: {way}: {phase}")
        for title, contest in chosen_contests(chosen_options(metafunc.config)).items()
        for way in contest.ways
        for phase in contest.phases
    ]
    metafunc.parametrize(("contest", "way", "phase"), cases)


Enter = Callable[[Contest], tuple[dict[str, Entrant], Rows]]


@pytest.fixture(scope="session")
def rules(request: pytest.FixtureRequest) -> Rules:
    options = chosen_options(request.config)
    return suites.rules_for(options, chosen_device(options.device))


@pytest.fixture(scope="session")
def enter(rules: Rules) -> Iterator[Enter]:
    """Contest -> its checked ways and their rows; it stays open until the next one is asked for."""
    with ExitStack() as stack:
        last: dict[str, Any] = {}

        def entered(contest: Contest) -> tuple[dict[str, Entrant], Rows]:
            if last.get("contest") is not contest:
                last.clear()
                stack.close()
                _, *last["ways"] = stack.enter_context(opened(contest, rules))
                last["contest"] = contest
            return last["ways"]

        yield entered
