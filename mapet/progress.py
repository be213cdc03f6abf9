"""Progress of a run, and of a long job, for the person watching: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from mapet.words import printable, say

if TYPE_CHECKING:
    from mapet.training.metrics import StepMetrics

SECONDS_BETWEEN_LINES = 10.0


class ProgressDisplay(Protocol):
    """Shows StepMetrics as they come."""

    def __enter__(self) -> ProgressDisplay: ...

    def __exit__(self, *exception: object) -> None: ...

    def show(self, metrics: StepMetrics) -> None:
        """Bring the display up to date."""

    def note(self, text: str) -> None:
        """Print one line that stays."""


class PlainProgress:
    """One line per report. Where they cannot be written, as nobody reads them any more, the run goes on without."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self.total, self.stream = total, stream

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def show(self, metrics: StepMetrics) -> None:
        self.note(f"step {metrics.step}/{self.total} · {describe(metrics)}")

    def note(self, text: str) -> None:
        with suppress(OSError):
            say(text, file=self.stream)


class LiveProgress:
    """A bar at the bottom of the terminal, and under it the numbers, wrapped where the terminal is narrow."""

    def __init__(self, total: int, start: int, console: Console) -> None:
        self.console = console
        self.bar = Progress(TextColumn("pre-training"), BarColumn(None), MofNCompleteColumn(), console=console)
        self.task = self.bar.add_task("", total=total, completed=start)
        self.live = Live(Group(self.bar, Text("starting")), console=console, refresh_per_second=4)
        self.validated: dict[str, float] = {}  # stays until the next epoch's

    def __enter__(self) -> LiveProgress:
        self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            self.live.stop()

    def show(self, metrics: StepMetrics) -> None:
        self.bar.update(self.task, completed=metrics.step)
        self.validated |= {name: value for name, value in metrics.metrics.items() if name.startswith("val_")}
        metrics = replace(metrics, metrics={**metrics.metrics, **self.validated})
        self.live.update(Group(self.bar, Text(describe(metrics))))

    def note(self, text: str) -> None:
        with suppress(OSError):
            self.console.print(Text(printable(text)))


def make_progress(total: int, start: int, stream: TextIO | None = None) -> ProgressDisplay:
    """The display for `stream` (standard output by default) of a run of `total` steps that begins at step `start`."""
    console = Console(file=stream or sys.stdout)
    return LiveProgress(total, start, console) if console.is_terminal else PlainProgress(total, console.file)


def describe(metrics: StepMetrics) -> str:
    """The numbers of a report in one line; without those of steps where none was taken since the last one."""
    stepped = not math.isnan(metrics.eta_seconds)
    parts = [
        f"epoch {metrics.epoch:.2f}",
        *([f"loss {metrics.loss:.4f}"] if stepped else []),
        *(f"{name} {shown(name, value)}" for name, value in metrics.metrics.items()),
    ]
    if stepped:
        parts += [
            f"lr {metrics.lr:.2e}",
            f"{metrics.images_per_second:.0f} images/s",
            f"data wait {100 * metrics.data_wait:.0f} %",
            f"ETA {duration(metrics.eta_seconds)}",
        ]
    return " · ".join(parts)


def shown(name: str, value: float) -> str:
    """A number that a method logs; an accuracy in per cent."""
    return f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show on stderr how many of `total` images are done, images/s and the time left; yields what adds images."""
    if sys.stderr.isatty():
        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), ImageRate(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(what, total=total)
            yield lambda count: bars.advance(task, count)
        return
    start = told = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        if (now := time.monotonic()) - told >= SECONDS_BETWEEN_LINES:
            told = now
            say(progress_line(what, done, total, now - start), file=sys.stderr)

    yield advance
    say(progress_line(what, done, total, time.monotonic() - start), file=sys.stderr)


class ImageRate(ProgressColumn):
    """Images per second, once they are known."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.0f} images/s")


def progress_line(what: str, done: int, total: int, seconds: float) -> str:
    """One line of plain progress, e.g. "tokenising: 512/1797 images, 128 images/s, 0:00:10 left"."""
    speed = done / max(seconds, 1e-9)
    left = duration((total - done) / speed if speed else 0)
    return f"{what}: {done}/{total} images, {speed:.0f} images/s, {left} left"
