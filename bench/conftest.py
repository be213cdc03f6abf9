"""pytest bench/ --benchmark-json out.json: the suites of `python -m bench run` as benchmarks of pytest-benchmark.

Contests are checked and measured as there: in turn, from a cold cache, by device events on a GPU. What pytest-benchmark
makes its statistics of are those durations, played back by its timer. Every option of `run` exists here by the same
name; several values are separated by commas: --suite kernels,step --dtype fp32,bf16.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from bench import suites
from bench.contest import Contest, Outcome, Rules, measure
from bench.options import SUITES, Options, check, chosen_device
from bench.records import device_state

LEFT_OUT = ("output",)
"""pytest-benchmark has its own: --benchmark-json, --benchmark-autosave."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "suites of python -m bench run")
    for field in dataclasses.fields(Options):
        if field.name in LEFT_OUT:
            continue
        if field.default is True:
            group.addoption(f"--no-{field.name}", dest=f"bench_{field.name}", action="store_false", default=True)
        else:
            group.addoption(f"--{field.name.replace('_', '-')}", dest=f"bench_{field.name}", default=None)


def chosen_options(config: pytest.Config) -> Options:
    """The options of the command line; UsageError where they cannot work here."""
    given = {}
    for name, kind in typing.get_type_hints(Options).items():
        value = config.getoption(f"bench_{name}", default=None)
        if value is not None:
            given[name] = value if isinstance(value, bool) else parsed(name, kind, value)
    try:
        options = Options(**given)
        check(options, chosen_device(options.device))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    return options


def parsed(name: str, kind: Any, text: str) -> Any:
    """A value of an option's type from text; UsageError says what is allowed."""
    if typing.get_origin(kind) is tuple:
        return tuple(parsed(name, typing.get_args(kind)[0], part) for part in text.split(","))
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    if choices and text not in choices:
        raise pytest.UsageError(f"--{name} takes {', '.join(choices)}, got {text!r}")
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError as error:
        raise pytest.UsageError(f"--{name.replace('_', '-')} takes a number, got {text!r}") from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each way and phase of each contest of the suites asked for."""
    if not {"contest", "way", "phase"} <= set(metafunc.fixturenames):
        return
    cases = [
        pytest.param(title, way, phase, id=f"{title}: {way}: {phase}")
        for title, contest in chosen_contests(chosen_options(metafunc.config)).items()
        for way in contest.ways
        for phase in contest.phases
    ]
    metafunc.parametrize(("contest", "way", "phase"), cases)


def chosen_contests(options: Options) -> dict[str, Contest]:
    """Contests of the suites asked for, by a title that a benchmark's JSON can hold."""
    device = chosen_device(options.device)
    return {
        f"{suite}: {contest.name}": contest
        for suite in SUITES
        if suite in options.suite
        for contest in suites.SUITES[suite](options, device)
    }


@pytest.fixture(scope="session")
def rules(request: pytest.FixtureRequest) -> Rules:
    """How contests are measured."""
    options = chosen_options(request.config)
    rates = any(suite in suites.NEED_RATES for suite in options.suite)
    return suites.rules_for(options, chosen_device(options.device), rates=rates)


@pytest.fixture(scope="session")
def machine(rules: Rules) -> dict[str, Any]:
    """What is measured on, before the first contest."""
    return device_state(rules.device)


class Measured:
    """Outcomes of contests: each is measured when the first of its ways is asked for, and all its ways with it."""

    def __init__(self, contests: dict[str, Contest], rules: Rules) -> None:
        self.contests, self.rules = contests, rules
        self.outcomes: dict[str, Outcome] = {}

    def __call__(self, title: str) -> Outcome:
        if title not in self.outcomes:
            self.outcomes[title] = measure(self.contests[title], self.rules)
        return self.outcomes[title]


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest, rules: Rules) -> Measured:
    """Title of a contest -> outcome."""
    return Measured(chosen_contests(chosen_options(request.config)), rules)


class Playback:
    """A timer for pytest-benchmark that gives the durations it was loaded with, one to every two readings."""

    __name__ = "playback"

    def __init__(self) -> None:
        self.readings: Iterator[float] = iter(())

    def load(self, seconds: list[float]) -> None:
        """Durations to give next."""
        self.readings = iter([reading for duration in seconds for reading in (0.0, duration)])

    def __call__(self) -> float:
        return next(self.readings)


PLAYBACK = Playback()
"""Named by the mark in bench_suites.py."""
