"""What the person watching sees."""

import io
import os

import pytest
from rich.console import Console

from mapet.progress import LiveProgress, PlainProgress, duration, make_progress
from mapet.training.metrics import StepMetrics

METRICS = StepMetrics(30, 1.5, 4.25, {"accuracy": 0.125}, 1.5e-3, 2.0, 2225.4, 0.03, 3661.0)


def test_a_plain_line_says_everything():
    stream = io.StringIO()
    with make_progress(100, 0, stream) as progress:
        assert isinstance(progress, PlainProgress)
        progress.show(METRICS)
    text = stream.getvalue()
    for part in ("30/100", "loss 4.25", "12.5 %", "1.50e-03", "2225 images/s", "data wait 3 %", "ETA 1:01:01"):
        assert part in text
    assert "\x1b" not in text and text.count("\n") == 1


def test_a_reader_that_leaves_does_not_end_a_run():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream, make_progress(100, 0, stream) as progress:
        progress.show(METRICS)
        progress.note("a line")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)


@pytest.mark.parametrize("width", [80, 160])
def test_a_terminal_gets_a_bar_with_the_numbers(width):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width)
    with LiveProgress(100, 20, console) as progress:
        progress.show(METRICS)
        progress.note("a line that stays [ok]")
    text = stream.getvalue()
    assert "30/100" in text and "a line that stays [ok]" in text
    for part in ("loss 4.25", "2225 images/s", "ETA 1:01:01"):
        assert part in text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3600 * 30 + 61, "30:01:01")])
def test_durations(seconds, text):
    assert duration(seconds) == text
