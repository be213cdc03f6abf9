"""Where the time of a pipeline goes: seconds by stage, read without making the host wait for a GPU.

Code marks its stages with `stage("network", device)`; a caller who wants the times runs it under `StageClock.running`.
Stages do not nest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

REMEDIES = {
    "decode": "more --workers, or a faster disk",
    "network": "more GPUs, --precision fp16 or --compile",
    "assign": "more GPUs, or a smaller vocabulary",
    "write": "a faster disk",
}
"""What makes a stage faster."""
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


@dataclass(frozen=True)
class TimeUse:
    """Where the time of encoding went, over all processes.

    Attributes:
        seconds: from the first image to the last, of the slowest process.
        images: that were read in them, by all processes.
        waited: seconds by stage that the processes waited for it, added up: decode, network, assign, write.
        total: seconds of all processes, added up.
    """

    seconds: float
    images: int
    waited: Mapping[str, float]
    total: float

    @classmethod
    def over(cls, used: Sequence[TimeUse]) -> TimeUse:
        """Of all processes, from that of each."""
        names = dict.fromkeys(name for one in used for name in one.waited)
        return cls(
            seconds=max(one.seconds for one in used),
            images=sum(one.images for one in used),
            waited={name: sum(one.waited.get(name, 0.0) for one in used) for name in names},
            total=sum(one.total for one in used),
        )

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def shares(self) -> dict[str, float]:
        """Part of the time by stage, and what is left as "other"; the parts add up to 1, or there are none."""
        if not self.total:
            return {}
        shares = {name: seconds / self.total for name, seconds in self.waited.items()}
        return {**shares, "other": max(0.0, 1 - sum(shares.values()))}

    @property
    def bottleneck(self) -> str | None:
        """The stage that most of the time was waited for; None where nothing was measured."""
        return max(self.waited, key=self.waited.__getitem__, default=None)

    def line(self) -> str:
        """One line of text."""
        shares = ", ".join(f"{name} {share:.0%}" for name, share in self.shares().items())
        remedy = REMEDIES.get(self.bottleneck or "")
        return f"time waited for: {shares}; the bottleneck is {self.bottleneck}" + (f" ({remedy})" if remedy else "")
