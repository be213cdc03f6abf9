"""Progress of a run for the person watching: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from dataclasses import replace
from typing import Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from mapet.training.metrics import StepMetrics
from mapet.words import printable, say


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
