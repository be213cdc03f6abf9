"""Calls that may break without ending a run: what came of them, or why nothing did."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Unavailable(RuntimeError):
    """A way that this machine does not have; the text says why."""


class Failure(NamedTuple):
    """Why a way was not measured. status: "unavailable", "failed", "wrong" (results) or "not run" (time limit)."""

    status: str
    reason: str


def guarded(call: Callable[[], Any]) -> tuple[Any, Failure | None]:
    """What the call returned, or why it did not: a way that breaks must not end the run."""
    try:
        return call(), None
    except Unavailable as error:
        return None, Failure("unavailable", str(error))
    except Exception as error:
        failure = Failure("failed", f"{type(error).__name__}: {first_line(error)}")
    gc.collect()  # the traceback held tensors
    return None, emptied(failure)


def emptied(failure: Failure) -> Failure:
    """Give the cached memory back. After an illegal access that raises as well: then the device is lost to this
    process, which the failure says besides its own reason, and every later call fails in its turn."""
    if not torch.cuda.is_available():
        return failure
    try:
        torch.cuda.empty_cache()
    except RuntimeError as error:
        lost = f"{failure.reason}; the device is lost to this process: {first_line(error)}"
        return failure._replace(reason=lost)
    return failure


def first_line(error: Exception) -> str:
    """The first line of an error's text, at most 300 characters."""
    return next(iter(str(error).strip().splitlines()), "")[:300]


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
