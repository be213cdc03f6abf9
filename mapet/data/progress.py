"""Progress of a long job on stderr: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from mapet.words import say

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` images are done, images/s and the time left; yields a function that adds images."""
    shown = _bar if sys.stderr.isatty() else _lines
    with shown(total, what) as advance:
        yield advance


@contextmanager
def _bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(what, total=total)
        yield lambda count: bars.advance(task, count)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.0f} images/s")


@contextmanager
def _lines(total: int, what: str) -> Iterator[Callable[[int], None]]:
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            say(progress_line(what, done, total, now - start), file=sys.stderr)

    yield advance
    say(progress_line(what, done, total, time.monotonic() - start), file=sys.stderr)


def progress_line(what: str, done: int, total: int, seconds: float) -> str:
    """One line of plain progress, e.g. "tokenising: 512/1797 images, 128 images/s, 0:10 left"."""
    speed = done / max(seconds, 1e-9)
    left = round((total - done) / speed) if speed else 0
    return f"{what}: {done}/{total} images, {speed:.0f} images/s, {left // 60}:{left % 60:02d} left"
