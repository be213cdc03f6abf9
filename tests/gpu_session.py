"""A pytest plugin: what a run on a GPU keeps on disk, and how one broken test costs only itself.

    --keep-failures FILE    every failure, whole, as soon as it is known; after a crash Python's stacks
    --stop-after SECONDS    tests that have not started by then are skipped by name; a worker of pytest-xdist whose test
                            still runs GRACE seconds later ends, with its stacks in the file

After each GPU test the device is waited for, so that an error is charged to the test that caused it. Such an error ends
the CUDA context of the process. Under pytest-xdist the process ends and a fresh one takes its remaining tests; the test
that caused it is then reported twice, as failed and as having ended its process. Without, they are skipped.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

PHASES = ("setup", "call", "teardown")
ENDED_BY_DEVICE_ERROR, ENDED_BY_CLOCK = 86, 87
"""Exit codes of a worker whose CUDA context is dead, and of one whose test did not end."""
STOP_AT = "stop_tests_at"
GRACE = 45.0
"""Seconds. Workers ignore Ctrl-C, so that a run would wait for one that hangs."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GPU session")
    group.addoption("--keep-failures", type=Path, metavar="FILE", help="append every failure to this file at once")
    group.addoption("--stop-after", type=float, metavar="SECONDS", help="start no test later than this")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Session(config), "gpu-session")


def device_error() -> str | None:
    """What the device reports when it is waited for, or None; where CUDA is not in use nothing is asked."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return None


class Session:
    """State of one process: the controller, a worker of pytest-xdist, or the only one."""

    def __init__(self, config: pytest.Config) -> None:
        self.failures: Path | None = config.getoption("--keep-failures")
        self.is_worker = hasattr(config, "workerinput")
        seconds = config.getoption("--stop-after")
        self.stop_at = None if seconds is None else time.time() + seconds
        if self.is_worker:  # one that replaces another has no more time than the first
            self.stop_at = config.workerinput[STOP_AT]
        self.context_died_in: str | None = None
        self.running: str | None = None
        self.stacks: Any = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """The controller tells a worker of pytest-xdist when to stop."""
        node.workerinput[STOP_AT] = self.stop_at

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self) -> None:
        """The stacks of all threads at a crash go into the same file; otherwise pytest writes them to stderr."""
        if self.failures is not None:
            self.failures.parent.mkdir(parents=True, exist_ok=True)
            self.stacks = self.failures.open("a")
            faulthandler.enable(file=self.stacks)
        if self.is_worker and self.stop_at is not None:
            watch = threading.Timer(self.stop_at + GRACE - time.time(), self.end_what_hangs)
            watch.daemon = True
            watch.start()

    def end_what_hangs(self) -> None:
        """Runs beside the test; this works as long as what hangs has released the interpreter, as CUDA's calls do."""
        if self.running is not None:
            if self.stacks is not None:
                self.stacks.write(f"===== {self.running} still ran {GRACE:.0f} s after the end of the run\n")
                self.stacks.flush()
                faulthandler.dump_traceback(file=self.stacks)
            os._exit(ENDED_BY_CLOCK)

    def pytest_unconfigure(self) -> None:
        if self.stacks is not None:
            faulthandler.disable()
            self.stacks.close()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.stop_at is not None and time.time() > self.stop_at:
            pytest.skip("not started: the time of the run was over (--stop-after)")
        if self.context_died_in is not None and item.get_closest_marker("gpu"):
            pytest.skip(f"the CUDA context died in {self.context_died_in}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Wait for the device after a GPU test; an error that only shows then makes the test fail."""
        report = yield
        if self.context_died_in is None and item.get_closest_marker("gpu") and (error := device_error()):
            self.context_died_in = item.nodeid
            if report.passed:
                report.outcome, report.longrepr = "failed", f"the device reports, after the test: {error}"
            report.sections.append(("CUDA context", f"dead from here on: {error}"))
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.running = item.nodeid
        result = yield
        self.running = None
        if self.context_died_in is not None and self.is_worker:
            os._exit(ENDED_BY_DEVICE_ERROR)  # without CUDA's own clean-up, which may hang now
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # The controller hears of every failure again, but only it hears of a worker's end, which has no phase.
        if report.failed and (not hasattr(report, "node") or report.when not in PHASES):
            self.keep(report, report.when)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.is_worker:
            self.keep(report, "collection")

    def keep(self, report: Any, phase: str) -> None:
        """Append a failure, whole, to the file; it is on the disk when this returns."""
        if self.failures is None:
            return
        parts = [f"===== {report.nodeid} failed ({phase}), {time.strftime('%H:%M:%S')}", report.longreprtext]
        parts += [f"----- {title}\n{text}" for title, text in report.sections]
        with self.failures.open("a") as file:
            file.write("\n".join(parts) + "\n\n")
            file.flush()
            with contextlib.suppress(OSError):  # a pipe or a terminal has nothing to sync
                os.fsync(file.fileno())
