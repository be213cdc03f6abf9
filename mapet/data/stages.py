"""Where the time of a pipeline goes: seconds by stage, read without making the host wait for a GPU.

Code marks its stages with `stage("network", device)`; a caller who wants the times runs it under `StageClock.running`.
Stages do not nest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

_CLOCK: ContextVar[StageClock | None] = ContextVar("clock", default=None)


def stage(name: str, device: torch.device | None = None) -> AbstractContextManager[None]:
    """Times the block under this name for the clock that is running; does nothing where none is.

    With a CUDA device its work is timed, on the device, otherwise the host.
    """
    clock = _CLOCK.get()
    return nullcontext() if clock is None else clock.measure(name, device)


class StageClock:
    """Adds up seconds by stage.

    Work on a GPU is timed by pairs of events in its stream, which are read once they have passed; the host is never
    made to wait for one but in `seconds`.

    Args:
        make_event: makes an event; `torch.cuda.Event` unless replaced by a test.
    """

    def __init__(self, make_event: Callable[..., Any] = torch.cuda.Event) -> None:
        self._make_event = make_event
        self._seconds: dict[str, float] = {}
        self._pending: deque[tuple[str, Any, Any]] = deque()

    @contextmanager
    def running(self) -> Iterator[StageClock]:
        """Within the block, `stage` reports to this clock."""
        token = _CLOCK.set(self)
        try:
            yield self
        finally:
            _CLOCK.reset(token)

    @contextmanager
    def measure(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Add the time of the block to the stage."""
        if device is None or device.type != "cuda":
            start = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - start)
            return
        begin, end = (self._make_event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._pending.append((name, begin, end))
        self._read_passed()

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, in the order in which the stages first ended; waits for the GPU's last stage."""
        if self._pending:
            self._pending[-1][2].synchronize()
        self._read_passed()
        return dict(self._seconds)

    def _read_passed(self) -> None:
        while self._pending and self._pending[0][2].query():
            name, begin, end = self._pending.popleft()
            self._add(name, begin.elapsed_time(end) / 1e3)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
